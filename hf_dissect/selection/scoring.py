"""One forward pass without gradient that tells how well each candidate's image and caption agree."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from hf_dissect.losses.contrastive import MAX_LOGITS, per_pair_loss
from hf_dissect.losses.logit_rows import sigmoid_losses, softmax_losses, split_rows
from hf_dissect.models.loading import logit_scale_and_bias


@dataclass
class CandidateScores:
    """What a strategy may know of `B` candidates.

    Attributes:
        sample_id: int64 `(B,)`, on the CPU.
        image_embeds, text_embeds: float32 `(B, D)`, unit length; None when the strategy asked for no scores.
        logit_scale: factor of the similarities in the model's logits (already exponentiated).
        logit_bias: added to the logits, for sigmoid losses.
        kind: "softmax" or "sigmoid", the loss the model trains with.
    """

    sample_id: torch.Tensor
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | float = 1.0
    logit_bias: torch.Tensor | float = 0.0
    kind: str = "softmax"

    @property
    def num_candidates(self) -> int:
        return len(self.sample_id)

    @cached_property
    def correlation(self) -> torch.Tensor:
        """`max(100 cos(image, text), 0)` of each pair, float32 `(B,)`, on the CPU (DISSect, predicted correlation)."""
        return correlation_of(self.image_embeds, self.text_embeds).cpu()

    @cached_property
    def loss(self) -> torch.Tensor:
        """Contrastive loss of each pair among the candidates of this rank, float32 `(B,)`, on the CPU."""
        logits = self.text_embeds @ self.image_embeds.T * self.logit_scale + self.logit_bias
        return per_pair_loss(logits.detach(), kind=self.kind).cpu()

    def subset(self, indices: torch.Tensor) -> "CandidateScores":
        """The scores of some candidates, `indices` int64 `(n,)`."""
        if self.image_embeds is None:
            return CandidateScores(self.sample_id[indices])
        on_device = indices.to(self.image_embeds.device)
        return CandidateScores(
            self.sample_id[indices],
            self.image_embeds[on_device],
            self.text_embeds[on_device],
            self.logit_scale,
            self.logit_bias,
            self.kind,
        )


def correlation_of(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """`max(100 cos(image, text), 0)`, float32 `(B,)`, of embeddings `(B, D)` of unit length."""
    return ((image_embeds * text_embeds).sum(-1).float() * 100).clamp_min(0)


@torch.no_grad()
def losses_of_rows(
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
    """Contrastive loss of `n` of `N` pairs among all of them, without ever holding `n x N` logits.

    Args:
        image_embeds, text_embeds: `(n, D)`, rows `offset` to `offset + n` of the following.
        all_image_embeds, all_text_embeds: `(N, D)`.
        offset: see above.
        scale, bias, kind: as in `CandidateScores`.

    Returns:
        float32 `(n,)` on the CPU.
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
) -> CandidateScores:
    """Score candidates with the current weights, leaving no trace in the model or in the random state.

    The model is called as a whole, so that DDP, FSDP, autocast and PEFT hooks hold, in evaluation mode, so that
    neither dropout nor batch-norm statistics move.

    Args:
        model: any CLIP-like model (or wrapper) whose forward returns `image_embeds` and `text_embeds` `(B, D)` and
            `logits_per_text` `(B, B)`.
        inputs: keyword arguments of the model, each with leading dimension `B`, on the model's device.
        sample_id: int64 `(B,)`.
        kind: "softmax" or "sigmoid", the loss the model trains with.
        chunk_size: candidates per forward pass; None for all at once.
        autocast: gives the context of mixed precision.
    """
    size = len(sample_id)
    step = chunk_size or size
    image_embeds, text_embeds = [], []
    with evaluation_mode(model), _untouched_random_state(inputs), autocast():
        for start in range(0, size, step):
            outputs = model(**{name: value[start : start + step] for name, value in inputs.items()})
            image_embeds.append(F.normalize(outputs["image_embeds"].float(), dim=-1))
            text_embeds.append(F.normalize(outputs["text_embeds"].float(), dim=-1))
    scale, bias = logit_scale_and_bias(model)
    embeds = torch.cat(image_embeds), torch.cat(text_embeds)
    return CandidateScores(sample_id.cpu(), *embeds, scale.mean(), bias.mean(), kind)


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Evaluation mode inside, every module's own mode afterwards (frozen parts may be in evaluation mode already)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _untouched_random_state(inputs: Mapping[str, torch.Tensor]) -> AbstractContextManager:
    device = next(iter(inputs.values())).device
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)
