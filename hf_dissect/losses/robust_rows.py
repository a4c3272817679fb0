"""Losses of rows of logits that are robust against mismatched pairs, in place of the cross-entropy."""

import math

import torch

from hf_dissect.losses.logit_rows import mask_negatives, promote_to_float32


def rince_losses(logits: torch.Tensor, first: int, mask: torch.Tensor | None, *, q: float, lam: float) -> torch.Tensor:
    """Compute the loss of RINCE (CVPR 2022, arXiv 2201.04309) of each row.

    With the logit `s+` of the true pair and the logits `s` of the row, it is
    `-exp(q s+) / q + (lam * sum(exp(s))) ** q / q`. For `q -> 0`, its gradient is that of the cross-entropy.

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; the entry of the true pair is ignored.
        q: Robustness, in (0, 1].
        lam: Weight of the row, in (0, 1].

    Returns:
        Losses `(r,)`, in at least single precision.
    """
    logits, positive = _read_logits(logits, first, mask)
    total = logits.logsumexp(1) + math.log(lam)
    return ((q * total).exp() - (q * positive).exp()) / q


def symnce_losses(logits: torch.Tensor, first: int, mask: torch.Tensor | None, *, beta: float) -> torch.Tensor:
    """Compute the symmetric InfoNCE loss (SymNCE, arXiv 2501.01130) of each row.

    With the softmax probabilities `p` of the row, it is `-log p+` of the true pair plus `beta` times the mean of
    `log p-` over the others, the reverse InfoNCE: what pulls the true partner is taken back from all others alike.

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; the entry of the true pair is ignored.
        beta: Weight of the reverse InfoNCE, at least 0.

    Returns:
        Losses `(r,)`, in at least single precision; a row without negatives has none of the second term.
    """
    logits, positive = _read_logits(logits, first, mask)
    total = logits.logsumexp(1)
    is_negative = logits > -torch.inf
    count = is_negative.sum(1) - 1
    others = logits.masked_fill(~is_negative, 0).sum(1) - positive
    reverse = torch.where(count > 0, others / count.clamp_min(1) - total, 0.0)
    return total - positive + beta * reverse


def _read_logits(logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits in at least single precision, masked ones `-inf`, and those of the true pairs."""
    logits = promote_to_float32(mask_negatives(logits, first, mask))
    return logits, logits.diagonal(first)
