"""What the processes of a run tell each other about their candidates; with one process, nothing."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator


class Ranks:
    """Exchanges small tensors between processes; what they gather lies on the CPU.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @property
    def count(self) -> int:
        return self._accelerator.num_processes

    @property
    def own(self) -> int:
        """Number of this process."""
        return self._accelerator.process_index

    @property
    def alone(self) -> bool:
        return self.count == 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate `(n, ...)`, of equal shape everywhere, over the ranks."""
        if not self.alone:
            values = self._accelerator.gather(values.to(self._accelerator.device))
        return values.cpu()

    def table(self, *numbers: int) -> torch.Tensor:
        """The integers that each rank brings: int64 `(count, number of integers)`."""
        return self.gather(torch.tensor([numbers], dtype=torch.int64))

    def gather_rows(self, values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate `(n, ...)` over the ranks, of which number r brings `sizes[r]` rows; stays on its device."""
        if self.alone:
            return values
        longest = max(1, *sizes)  # at least 1, as nothing cannot be split by rank
        device = self._accelerator.device
        padded = torch.zeros(longest, *values.shape[1:], dtype=values.dtype, device=device)
        padded[: len(values)] = values
        parts = self._accelerator.gather(padded).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(values.device)

    def gather_columns(self, columns: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> dict[str, torch.Tensor]:
        """Concatenate columns `(n,)` of any types over the ranks (see `gather_rows`), all of them in one exchange."""
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

    def send_rows(self, values: torch.Tensor, to_ranks: Sequence[int], from_ranks: Sequence[int]) -> torch.Tensor:
        """Send rows to other ranks and return those received, ordered by their sender.

        Args:
            values: `(sum(to_ranks), ...)`, ordered by receiver.
            to_ranks: rows that go to each rank.
            from_ranks: rows that come from each rank.

        Returns:
            `(sum(from_ranks), ...)`, on the device of `values`.
        """
        sent = values.to(self._accelerator.device).contiguous()
        as_bytes = sent.dtype == torch.bool
        sent = sent.view(torch.uint8) if as_bytes else sent
        received = sent.new_empty(sum(from_ranks), *sent.shape[1:])
        dist.all_to_all_single(received, sent, list(from_ranks), list(to_ranks))
        return (received.view(torch.bool) if as_bytes else received).to(values.device)

    def gather_objects(self, item: object) -> list:
        """What each rank brings, in their order."""
        if self.alone:
            return [item]
        everywhere: list = [None] * self.count
        dist.all_gather_object(everywhere, item)
        return everywhere

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self._accelerator.wait_for_everyone()
