"""What the processes of a run tell each other about their candidates; with one process, nothing."""

import torch
from accelerate import Accelerator


class Ranks:
    """Exchanges small tensors between processes; results lie on the CPU.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @property
    def alone(self) -> bool:
        return self._accelerator.num_processes == 1

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number if self.alone else int(self.gather(torch.tensor([number])).min())

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate `(n, ...)`, of equal shape everywhere, over the ranks."""
        if not self.alone:
            values = self._accelerator.gather(values.to(self._accelerator.device))
        return values.cpu()

    def gather_ragged(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate `(n,)`, of a length that may differ, over the ranks."""
        if self.alone:
            return values.cpu()
        sizes = self.gather(torch.tensor([len(values)])).tolist()
        longest = max(1, *sizes)  # at least 1, as nothing cannot be split by rank
        padded = torch.zeros(longest, dtype=values.dtype)
        padded[: len(values)] = values
        rows = self.gather(padded).split(longest)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
