"""Mean over the rows that a term counts, however they are spread over the ranks."""

import torch
import torch.distributed as dist

from hf_dissect.distributed import get_rank_and_world_size


def mean_over_rows(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the mean over the counted rows of all ranks.

    DDP averages the gradients over the ranks, and the Trainer averages the losses. Each rank therefore divides its sum
    by the mean number of counted rows per rank: the average of these quotients is the mean over all counted rows.

    Args:
        values: Value of each row, `(B,)`; a row that is not counted may hold any finite number.
        counted: Mask of the counted rows, bool `(B,)`.

    Returns:
        A scalar with gradient; 0 if no rank counts a row.
    """
    number = counted.sum().to(values.dtype)
    world_size = get_rank_and_world_size()[1]
    if world_size > 1:
        dist.all_reduce(number)
    return torch.where(counted, values, 0).sum() * world_size / number.clamp_min(1)
