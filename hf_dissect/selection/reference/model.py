"""A frozen dual encoder that scores candidates next to the model that trains."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.models.families import bare_model
from hf_dissect.models.loading import find_loss_kind, logit_scale_and_bias
from hf_dissect.selection.scoring import CandidateScores, score

LARGEST_STORE = 2**30
"""Bytes of host memory that each process may fill with the embeddings of a reference."""


class ReferenceModel:
    """Frozen dual encoder, in evaluation mode, which is part of neither the model nor its optimiser or checkpoints.

    Args:
        model: Dual encoder that reads the same inputs as the model that trains; its weights are frozen.
        name: Hub id or folder that it was loaded from; None for the name that the model has.

    Attributes:
        kind: Loss that it was trained with, `"softmax"` or `"sigmoid"`.
        store: Embeddings of all pairs, if they are kept.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name or getattr(bare_model(model), "name_or_path", "") or type(bare_model(model)).__name__
        self.kind = find_loss_kind(model)
        self.store: EmbeddingStore | None = None

    def score(
        self,
        batch: Mapping[str, torch.Tensor],
        sample_id: torch.Tensor,
        *,
        chunk_size: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> CandidateScores:
        """Score `B` candidates, from the stored embeddings if there are any.

        Args:
            batch: Candidates on the device of the model.
            sample_id: Sample ids, int64 `(B,)`, on the CPU.
            chunk_size: Candidates in one forward pass; None for all.
            autocast: Function that returns the context of mixed precision.
        """
        if self.store is not None:
            device = next(self.model.parameters()).device
            image_embeds, text_embeds = (part.to(device).float() for part in self.store.read(sample_id))
            scale, bias = logit_scale_and_bias(self.model)
            return CandidateScores(sample_id, image_embeds, text_embeds, scale.mean(), bias.mean(), self.kind)
        inputs = forward_inputs(self.model, batch)
        return score(
            self.model, inputs, sample_id, kind=self.kind, chunk_size=chunk_size or len(sample_id), autocast=autocast
        )


class EmbeddingStore:
    """Embeddings of all pairs in half precision, in the memory of this process; zeros for a pair without any.

    Args:
        num_samples: Number of pairs; their ids are the row numbers.
        dim: Dimension of the embeddings.
    """

    def __init__(self, num_samples: int, dim: int) -> None:
        self._embeds = torch.zeros(2, num_samples, dim, dtype=torch.float16)

    @staticmethod
    def fits(num_samples: int | None, dim: int) -> bool:
        """Return True if ids are row numbers and the embeddings take at most `LARGEST_STORE` bytes."""
        return num_samples is not None and 4 * num_samples * dim <= LARGEST_STORE

    def read(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of images and captions, float16 `(2, B, D)`."""
        return self._embeds[:, sample_id]

    def write(self, sample_id: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> None:
        """Store the embeddings of images and captions, `(B, D)` each."""
        self._embeds[:, sample_id] = torch.stack([image_embeds, text_embeds]).to("cpu", torch.float16)
