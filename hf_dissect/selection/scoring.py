"""Scoring of candidates by one forward pass without gradient: the agreement of each image with its caption."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F

from hf_dissect.losses.contrastive import MAX_LOGITS, per_pair_loss
from hf_dissect.losses.logit_rows import sigmoid_losses, softmax_losses, split_rows
from hf_dissect.losses.noisy_channel import find_evidence
from hf_dissect.models.families import check_outputs
from hf_dissect.models.loading import logit_scale_and_bias


@dataclass
class CandidateScores:
    """The scores of `B` candidates, as a strategy sees them.

    Attributes:
        sample_id: Ids of the candidates, int64 `(B,)`, on the CPU.
        image_embeds: Embeddings float32 `(B, D)` of unit length; None if the strategy needs no scores.
        text_embeds: Embeddings float32 `(B, D)` of unit length; None if the strategy needs no scores.
        logit_scale: Factor of the similarities in the model's logits (already exponentiated).
        logit_bias: Summand of the logits, for sigmoid losses.
        kind: Loss that the model trains with, `"softmax"` or `"sigmoid"`.
        is_part: True if a plan chose the candidates from a larger block, of which the others keep their past.
        reference: Scores of the same candidates by the reference model; None if it did not score them.
        past_correlation: Correlations under a copy of the model from earlier steps, float32 `(B,)` on the CPU; None
            without one.
    """

    is_part: ClassVar[bool] = False
    sample_id: torch.Tensor
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | float = 1.0
    logit_bias: torch.Tensor | float = 0.0
    kind: str = "softmax"
    reference: "CandidateScores | None" = None
    past_correlation: torch.Tensor | None = None

    @property
    def num_candidates(self) -> int:
        """Number of candidates `B`."""
        return len(self.sample_id)

    @cached_property
    def correlation(self) -> torch.Tensor:
        """Correlation `max(100 cos(image, text), 0)` of each pair, float32 `(B,)` on the CPU (DISSect)."""
        return compute_correlation(*self.get_embeds()).cpu()

    @cached_property
    def loss(self) -> torch.Tensor:
        """Contrastive loss of each pair among the candidates of this rank, float32 `(B,)` on the CPU."""
        return self._compute_losses(self.kind)

    @cached_property
    def softmax_loss(self) -> torch.Tensor:
        """Softmax loss of each pair among the candidates, float32 `(B,)` on the CPU, also for the sigmoid loss."""
        return self.loss if self.kind == "softmax" else self._compute_losses("softmax")

    def temper_softmax_loss(self, temperature: float) -> torch.Tensor:
        """Return the softmax loss of each pair with the logits times `temperature`, float32 `(B,)` on the CPU."""
        return self.softmax_loss if temperature == 1 else self._compute_losses("softmax", temperature)

    @cached_property
    def evidence(self) -> torch.Tensor:
        """Evidence of each pair against a stranger, float32 `(B,)` on the CPU, see `compute_pair_evidence`."""
        return find_evidence(self.softmax_loss, self.num_candidates)

    def _compute_losses(self, kind: str, temperature: float = 1.0) -> torch.Tensor:
        image_embeds, text_embeds = self.get_embeds()
        logits = text_embeds @ image_embeds.T * (self.logit_scale * temperature) + self.logit_bias
        return per_pair_loss(logits.detach(), kind=kind).cpu()

    @cached_property
    def own_loss(self) -> torch.Tensor:
        """Loss `-log q` of each pair, float32 `(B,)` on the CPU.

        The probability `q` is that of its partner among the candidates (softmax), or of being a pair (sigmoid).
        """
        if self.kind == "softmax":
            return self.loss
        image_embeds, text_embeds = self.get_embeds()
        logits = (image_embeds * text_embeds).sum(-1).float() * self.logit_scale + self.logit_bias
        return F.softplus(-logits).detach().cpu()

    def get_embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of images and texts `(B, D)` of scored candidates.

        Raises:
            ValueError: If the candidates were not scored.
        """
        if self.image_embeds is None or self.text_embeds is None:
            raise ValueError(
                "The candidates have no scores; a strategy that uses them must return True from needs_scores."
            )
        return self.image_embeds, self.text_embeds

    def subset(self, indices: torch.Tensor) -> "CandidateScores":
        """Return the scores of some candidates, given by their positions int64 `(n,)`."""
        reference = None if self.reference is None else self.reference.subset(indices)
        if self.image_embeds is None or self.text_embeds is None:
            return CandidateScores(self.sample_id[indices], reference=reference)
        on_device = indices.to(self.image_embeds.device)
        return CandidateScores(
            self.sample_id[indices],
            self.image_embeds[on_device],
            self.text_embeds[on_device],
            self.logit_scale,
            self.logit_bias,
            self.kind,
            reference,
            None if self.past_correlation is None else self.past_correlation[indices],
        )


def compute_correlation(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Compute `max(100 cos(image, text), 0)`, float32 `(B,)`, of embeddings `(B, D)` of unit length."""
    return ((image_embeds * text_embeds).sum(-1).float() * 100).clamp_min(0)


correlation_of = compute_correlation
"""Former name of `compute_correlation`."""


@torch.no_grad()
def compute_row_losses(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    all_image_embeds: torch.Tensor,
    all_text_embeds: torch.Tensor,
    *,
    offset: int,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    kind: str,
) -> torch.Tensor:
    """Compute the contrastive loss of `n` of `N` pairs among all of them, without `n x N` logits in memory.

    Args:
        image_embeds: Embeddings `(n, D)` of unit length.
        text_embeds: Embeddings `(n, D)` of unit length.
        all_image_embeds: Embeddings `(N, D)`, with `image_embeds` in the rows `offset` to `offset + n`.
        all_text_embeds: Embeddings `(N, D)`, with `text_embeds` in the same rows.
        offset: Row of the first pair among all of them.
        scale: Factor of the similarities in the logits.
        bias: Summand of the logits.
        kind: Loss that the model trains with, `"softmax"` or `"sigmoid"`.

    Returns:
        Losses, float32 `(n,)` on the CPU.
    """
    losses = []
    for rows in split_rows(len(image_embeds), len(all_image_embeds), MAX_LOGITS):
        first = offset + rows.start
        per_text = text_embeds[rows] @ all_image_embeds.T * scale + bias
        if kind == "sigmoid":
            losses.append(sigmoid_losses(per_text, first, None))
        else:
            per_image = image_embeds[rows] @ all_text_embeds.T * scale
            losses.append((softmax_losses(per_text, first, None) + softmax_losses(per_image, first, None)) / 2)
    return torch.cat(losses).float().cpu() if losses else torch.zeros(0)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    sample_id: torch.Tensor,
    *,
    kind: str = "softmax",
    chunk_size: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    encode: Callable[..., Mapping[str, torch.Tensor]] | None = None,
) -> CandidateScores:
    """Score candidates with the current weights, without a trace in the model or in the random state.

    The model is called as a whole, so that DDP, FSDP, autocast and PEFT hooks apply. It runs in evaluation mode, so
    that neither dropout nor batch-norm statistics change.

    Args:
        model: CLIP-like model, wrapped or not, whose forward pass returns `image_embeds` and `text_embeds` `(B, D)`
            and `logits_per_text` `(B, B)`.
        inputs: Keyword arguments of the model, each with leading dimension `B`, on the model's device.
        sample_id: Ids of the candidates, int64 `(B,)`.
        kind: Loss that the model trains with, `"softmax"` or `"sigmoid"`.
        chunk_size: Number of candidates per forward pass; None for all at once.
        autocast: Function that returns the context of mixed precision.
        encode: Function to call with the inputs in place of the model; None for the model itself.
    """
    size = len(sample_id)
    step = chunk_size or size
    image_embeds, text_embeds = [], []
    forward = model if encode is None else encode
    with evaluation_mode(model), _preserve_random_state(inputs), autocast():
        for start in range(0, size, step):
            outputs = forward(**{name: value[start : start + step] for name, value in inputs.items()})
            check_outputs(outputs)
            image_embeds.append(F.normalize(outputs["image_embeds"].float(), dim=-1))
            text_embeds.append(F.normalize(outputs["text_embeds"].float(), dim=-1))
    scale, bias = logit_scale_and_bias(model)
    embeds = torch.cat(image_embeds), torch.cat(text_embeds)
    return CandidateScores(sample_id.cpu(), *embeds, scale.mean(), bias.mean(), kind)


def choose_autocast(
    model: torch.nn.Module, dtype: torch.dtype | None, default: Callable[[], AbstractContextManager]
) -> Callable[[], AbstractContextManager]:
    """Return the context of mixed precision for a scoring forward pass: that of a type, or the default for None."""
    if dtype is None:
        return default
    return lambda: torch.autocast(next(model.parameters()).device.type, dtype)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore every module's own mode at the end (frozen parts may differ).

    Args:
        model: Model, wrapped or not.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _preserve_random_state(inputs: Mapping[str, torch.Tensor]) -> AbstractContextManager:
    device = next(iter(inputs.values())).device
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)
