"""The InfoNCE lower bound of mutual information, with the negatives of all ranks and of past batches."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size


@dataclass(frozen=True)
class InformationEstimate:
    """What `information_loss` finds.

    Attributes:
        loss: with gradient.
        bound: on the mutual information in nats, `log N - L_NCE`.
        pairs: the counted vectors of all ranks `(2, n, size)`, without gradient, for a `MemoryBank`.
    """

    loss: torch.Tensor
    bound: torch.Tensor
    pairs: torch.Tensor


class MemoryBank:
    """The compared vectors of past batches as further negatives, first in, first out.

    Their encoders have moved on since: a large bank makes the bound tighter and its negatives staler. The bank holds
    the same on all ranks.

    Args:
        capacity: pairs held.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.vectors: torch.Tensor | None = None  # (2, n, size)

    def add(self, pairs: torch.Tensor) -> None:
        """Take in vectors `(2, n, size)` that all ranks have, the oldest of the bank making room."""
        held = pairs if self.vectors is None else torch.cat([self.vectors.to(pairs.device), pairs], 1)
        self.vectors = held[:, -self.capacity :].contiguous()


def information_loss(
    compared: torch.Tensor, counted: torch.Tensor, temperature: float, bank: MemoryBank | None = None
) -> InformationEstimate:
    """Contrast each x with its y among the y of all counted rows, and each y likewise.

    `I(X;Y) >= log N - L_NCE` (van den Oord et al., arXiv 1807.03748, section 2.3) with N candidates,
    the true one included; the mean over both directions is taken. Candidates from a bank count in N.

    Args:
        compared: `(2, B, size)`, x first, of unit length, equally many rows on every rank.
        counted: bool `(B,)`; other rows are neither contrasted nor candidates.
        temperature: that the cosines are divided by.
        bank: of past pairs; it is read here and not changed.

    Returns:
        Scalars whose averages over the ranks are those of the union of the rows.
    """
    with torch.autocast(compared.device.type, enabled=False):
        compared = compared.float()
        first = get_rank_and_world_size()[0] * compared.shape[1]
        true = torch.arange(first, first + compared.shape[1], device=compared.device)
        present = gather_last_dimension(counted.to(torch.uint8)[None])[0].bool()
        # x and y side by side, so that one exchange does for both.
        everywhere = gather_with_grad(torch.cat(list(compared), dim=1)).unflatten(1, (2, -1)).transpose(0, 1)
        losses, candidates = [], present.sum()
        for place, own in enumerate(compared):
            logits = own @ everywhere[1 - place].T / temperature
            logits = logits.masked_fill(
                ~present & (torch.arange(len(present), device=own.device) != true[:, None]), -torch.inf
            )
            if bank is not None and bank.vectors is not None:
                logits = torch.cat([logits, own @ bank.vectors[1 - place].to(own).T / temperature], dim=1)
            losses.append(F.cross_entropy(logits, true, reduction="none"))
        if bank is not None and bank.vectors is not None:
            candidates = candidates + bank.vectors.shape[1]
        loss = mean_over_rows(sum(losses) / 2, counted)
        bound = candidates.clamp_min(1).log() - loss.detach()
    pairs = everywhere.detach()[:, present]
    return InformationEstimate(loss, torch.where(candidates > 0, bound, math.nan), pairs)
