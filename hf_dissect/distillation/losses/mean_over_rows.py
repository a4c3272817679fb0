"""Means over those rows of all ranks that a term looks at, however they are spread over the ranks."""

import torch
import torch.distributed as dist

from hf_dissect.distributed import get_rank_and_world_size


def mean_over_rows(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean over the counted rows of all ranks, in the form whose average over the ranks it is.

    DDP averages gradients, and the Trainer losses, over the ranks: so that the average is the mean over the union of
    the rows, each rank's sum is divided by the mean number of counted rows.

    Args:
        values: `(B,)`; those not counted may be anything finite.
        counted: bool `(B,)`.

    Returns:
        A scalar with gradient; 0 when no row is counted anywhere.
    """
    number = counted.sum().to(values.dtype)
    world_size = get_rank_and_world_size()[1]
    if world_size > 1:
        dist.all_reduce(number)
    return torch.where(counted, values, 0).sum() * world_size / number.clamp_min(1)
