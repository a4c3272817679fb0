"""Scores of the pairs of a block that a plan has loaded, among those of it that train."""

from functools import cached_property

import torch
import torch.nn.functional as F

from hf_dissect.losses.noisy_channel import find_evidence
from hf_dissect.losses.pair_evidence import recover_losses
from hf_dissect.selection.scoring import CandidateScores


class LoadedScores(CandidateScores):
    """Scores of the pairs of a block that were loaded: `k` that trained, and `h` that were scored after it.

    The pairs that trained are the context of all: each of the others is compared with these and itself.

    Args:
        sample_id: Ids of the pairs that trained, then of the others, int64 `(k + h,)`.
        trained: Embeddings of the images and captions that trained, `(k, D)` each of unit length.
        held: Scores of the others; None if none was scored.
        scale_and_bias: Factor and summand of the logits.
        kind: Loss that the model trains with.
    """

    is_part = True

    def __init__(
        self,
        sample_id: torch.Tensor,
        trained: tuple[torch.Tensor, torch.Tensor],
        held: CandidateScores | None,
        scale_and_bias: tuple[torch.Tensor, torch.Tensor],
        kind: str,
    ) -> None:
        self._num_trained = len(trained[0])
        parts = [trained] if held is None else [trained, held.get_embeds()]
        images, texts = (torch.cat(both) for both in zip(*parts, strict=True))
        scale, bias = (value.detach().mean() for value in scale_and_bias)
        super().__init__(sample_id[: len(images)], images, texts, scale, bias, kind)

    @cached_property
    def evidence(self) -> torch.Tensor:
        """Evidence of each pair against those that trained, float32 `(k + h,)` on the CPU."""
        return self._find_evidence(self.logit_scale)

    def _find_evidence(self, scale: torch.Tensor | float) -> torch.Tensor:
        images, texts = self.get_embeds()
        k = self._num_trained
        own = (images * texts).sum(-1) * scale
        losses = torch.zeros_like(own)
        for rows, columns in ((images, texts[:k]), (texts, images[:k])):
            total = torch.logsumexp(rows @ columns.T * scale, dim=1)
            total = torch.cat([total[:k], torch.logaddexp(total[k:], own[k:])])
            losses += (total - own) / 2
        counts = torch.where(torch.arange(len(own), device=own.device) < k, k, k + 1)
        return find_evidence(losses, counts).cpu()

    def _compute_losses(self, kind: str, temperature: float = 1.0) -> torch.Tensor:
        """Compute the losses that the pairs would have among as many as were loaded, from their evidence."""
        if kind == "softmax":
            evidence = self.evidence if temperature == 1 else self._find_evidence(self.logit_scale * temperature)
            return recover_losses(evidence, self.num_candidates)
        images, texts = self.get_embeds()
        k = self._num_trained
        negatives = F.softplus(texts @ images[:k].T * self.logit_scale + self.logit_bias)
        negatives[:, :k].fill_diagonal_(0)
        others = torch.where(torch.arange(len(texts), device=texts.device) < k, k - 1, k).clamp_min(1)
        own = F.softplus(-((images * texts).sum(-1) * self.logit_scale + self.logit_bias))
        return (own + negatives.sum(1) * (self.num_candidates - 1) / others).cpu()
