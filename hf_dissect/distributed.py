"""Exchange between the processes of a run; a single process keeps its own values.

The functions serve losses, which see no accelerator and may need a gradient; `Ranks` serves everything else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather


def get_rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; `(0, 1)` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors `(b, D)` of all ranks to `(b * world size, D)`, with gradient for the own rows."""
    return tensor if get_rank_and_world_size()[1] == 1 else _GatherWithGrad.apply(tensor)


def gather_last_dimension(values: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors `(n, b)` of all ranks to `(n, b * world size)`, without gradient."""
    return values if get_rank_and_world_size()[1] == 1 else _gather(values.T).T


def scale_to_mean_one(weights: torch.Tensor) -> torch.Tensor:
    """Scale the weights of the own pairs `(k,)` so that the mean over the pairs of all ranks is 1, or all are 0."""
    mean = gather_last_dimension(weights[None]).mean()
    return weights / mean.clamp_min(torch.finfo(weights.dtype).tiny)


def pass_to_next_rank(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Send tensors to the next rank, and return the tensors of the previous rank, of the same shapes and types."""
    rank, world_size = get_rank_and_world_size()
    if world_size == 1:
        return tensors
    received = [torch.empty_like(tensor) for tensor in tensors]
    operations = []
    for tag, (sent, place) in enumerate(zip(tensors, received, strict=True)):
        operations.append(dist.P2POp(dist.isend, sent.contiguous(), (rank + 1) % world_size, tag=tag))
        operations.append(dist.P2POp(dist.irecv, place, (rank - 1) % world_size, tag=tag))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


class Ranks:
    """Exchange of small tensors between processes; gathered tensors are on the CPU.

    Args:
        accelerator: Accelerator of the trainer; None for the processes that `accelerate` sees.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = PartialState() if accelerator is None else accelerator

    @property
    def count(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def own(self) -> int:
        """Rank of this process, from 0."""
        return self._accelerator.process_index

    @property
    def alone(self) -> bool:
        """True for a run of one process."""
        return self.count == 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors `(n, ...)` of all ranks, which have the same shape."""
        if not self.alone:
            values = gather(values.to(self._accelerator.device))
        return values.cpu()

    def gather_numbers(self, *numbers: int) -> torch.Tensor:
        """Gather some integers of each rank, int64 `(count, number of integers)`."""
        return self.gather(torch.tensor([numbers], dtype=torch.int64))

    def gather_rows(self, values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate tensors of different lengths over the ranks.

        Args:
            values: Rows of this rank, `(sizes[own], ...)`.
            sizes: Number of rows of each rank.

        Returns:
            Rows of all ranks, `(sum(sizes), ...)`, on the device of `values`.
        """
        if self.alone:
            return values
        longest = max(1, *sizes)  # tensors without rows could not be split by rank
        device = self._accelerator.device
        padded = torch.zeros(longest, *values.shape[1:], dtype=values.dtype, device=device)
        padded[: len(values)] = values
        parts = gather(padded).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(values.device)

    def gather_columns(self, columns: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> dict[str, torch.Tensor]:
        """Concatenate columns of any types over the ranks, all of them in one exchange.

        Args:
            columns: Columns of this rank by name, `(sizes[own],)` each.
            sizes: Number of rows of each rank.

        Returns:
            Columns of all ranks by name, `(sum(sizes),)` each, on the CPU.
        """
        if self.alone:
            return {name: column.cpu() for name, column in columns.items()}
        parts = [
            column.cpu().contiguous().view(torch.uint8).view(len(column), column.element_size())
            for column in columns.values()
        ]
        everywhere = self.gather_rows(torch.cat(parts, dim=1), sizes).cpu()
        split = everywhere.split([part.shape[1] for part in parts], dim=1)
        return {
            name: part.contiguous().view(-1).view(column.dtype)
            for (name, column), part in zip(columns.items(), split, strict=True)
        }

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sums `(m,)` over all ranks, added in their order, so that they are the same on each."""
        return sums if self.alone else self.gather(sums[None]).sum(0)

    def send_rows(self, values: torch.Tensor, to_ranks: Sequence[int], from_ranks: Sequence[int]) -> torch.Tensor:
        """Send rows to other ranks, and return the rows that they sent.

        Args:
            values: Rows to send, `(sum(to_ranks), ...)`, in the order of their receivers.
            to_ranks: Number of rows for each rank.
            from_ranks: Number of rows from each rank.

        Returns:
            Received rows, `(sum(from_ranks), ...)`, in the order of their senders and on the device of `values`.
        """
        sent = values.to(self._accelerator.device).contiguous()
        as_bytes = sent.dtype == torch.bool
        sent = sent.view(torch.uint8) if as_bytes else sent
        received = sent.new_empty(sum(from_ranks), *sent.shape[1:])
        dist.all_to_all_single(received, sent, list(from_ranks), list(to_ranks))
        return (received.view(torch.bool) if as_bytes else received).to(values.device)

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the objects of all ranks, in the order of the ranks."""
        if self.alone:
            return [item]
        everywhere: list[Any] = [None] * self.count
        dist.all_gather_object(everywhere, item)
        return everywhere

    def wait(self) -> None:
        """Wait until all ranks have called this method."""
        self._accelerator.wait_for_everyone()


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    gathered = tensor.new_empty(len(tensor) * dist.get_world_size(), *tensor.shape[1:])
    dist.all_gather_single(gathered, tensor.contiguous())
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(tensor)
        return _gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own
