"""Evidence that a caption belongs to its image, in a form that does not depend on the size of the batch."""

import torch
import torch.nn.functional as F

SMALLEST_LOSS = 1e-6
"""Smallest loss that evidence is computed from, so that it stays finite."""


def compute_pair_evidence(losses: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """Compute the log odds of a pair against one stranger, `log((n - 1) q / (1 - q))` with `q = exp(-loss)`.

    The softmax over `n` pairs gives a true partner against `n - 1` strangers the probability `q`. What it would give
    it against any other number of strangers follows from these log odds, see `recover_losses`.

    Args:
        losses: Contrastive losses of the pairs `(b,)`, at least 0, see `hf_dissect.losses.contrastive.Weigh`.
        counts: Number `n` of pairs that each was found among, itself included, `(b,)` or one for all, at least 2.

    Returns:
        Evidence `(b,)`, finite.
    """
    losses = losses.clamp_min(SMALLEST_LOSS)
    return _log_strangers(losses, counts) - losses - torch.log(-torch.expm1(-losses))


def recover_losses(evidence: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """Compute the losses that pairs with some evidence would have among `n` pairs, the inverse of the evidence.

    Args:
        evidence: Evidence of the pairs `(b,)`.
        counts: Number `n` of pairs, `(b,)` or one for all, at least 2.

    Returns:
        Losses `(b,)`, above 0.
    """
    return F.softplus(_log_strangers(evidence, counts) - evidence)


def _log_strangers(like: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    return (torch.as_tensor(counts, dtype=like.dtype, device=like.device) - 1).clamp_min(1).log()
