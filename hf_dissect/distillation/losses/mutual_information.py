"""InfoNCE lower bound of the mutual information, with negatives from all ranks and from past batches."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size


@dataclass(frozen=True)
class InformationEstimate:
    """Result of `information_loss`.

    Attributes:
        loss: Contrastive loss `L_NCE`, a scalar with gradient.
        bound: Lower bound of the mutual information in nats, `log N - L_NCE`, a scalar.
        pairs: Counted pairs of vectors of all ranks, `(2, n, size)` without gradient, for a `MemoryBank`.
    """

    loss: torch.Tensor
    bound: torch.Tensor
    pairs: torch.Tensor


class MemoryBank:
    """Pairs of vectors of past batches that serve as further negatives, first in, first out.

    The weights have changed since the vectors were computed: a larger bank makes the bound tighter, but its oldest
    vectors less accurate. All ranks hold the same vectors.

    Args:
        capacity: Largest number of pairs in the bank.

    Attributes:
        vectors: Pairs in the bank, `(2, n, size)`, the oldest first; None while it is empty.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.vectors: torch.Tensor | None = None

    def add(self, pairs: torch.Tensor) -> None:
        """Add pairs and remove the oldest ones beyond the capacity.

        Args:
            pairs: Vectors, `(2, n, size)`, the same on all ranks.
        """
        held = pairs if self.vectors is None else torch.cat([self.vectors.to(pairs.device), pairs], 1)
        self.vectors = held[:, -self.capacity :].contiguous()


def information_loss(
    compared: torch.Tensor, counted: torch.Tensor, temperature: float, bank: MemoryBank | None = None
) -> InformationEstimate:
    """Contrast each x with the y of all counted rows, and each y with their x.

    `I(X;Y) >= log N - L_NCE` (van den Oord et al., arXiv 1807.03748, section 2.3), where N is the number of
    candidates: the true partner, the other rows and the pairs of the bank. `L_NCE` is the mean over both directions.

    Args:
        compared: Vectors of unit length, `(2, B, size)`, x first, equally many rows on every rank.
        counted: Mask of the rows that are contrasted and serve as candidates, bool `(B,)`.
        temperature: Divisor of the cosines.
        bank: Past pairs, which are read and not changed; None for the batch alone.

    Returns:
        Loss and bound, whose averages over the ranks are those of all rows, and the pairs of this batch.
    """
    with torch.autocast(compared.device.type, enabled=False):
        compared = compared.float()
        first = get_rank_and_world_size()[0] * compared.shape[1]
        true = torch.arange(first, first + compared.shape[1], device=compared.device)
        present = gather_last_dimension(counted.to(torch.uint8)[None])[0].bool()
        # x and y travel in one tensor, so that one exchange is enough.
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
        loss = mean_over_rows((losses[0] + losses[1]) / 2, counted)
        bound = candidates.clamp_min(1).log() - loss.detach()
    pairs = everywhere.detach()[:, present]
    return InformationEstimate(loss, torch.where(candidates > 0, bound, math.nan), pairs)
