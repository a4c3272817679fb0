"""Functions by which the loop around a selector exchanges values, moves batches, measures time and stops."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from hf_dissect.distributed import Ranks

Batch = dict[str, torch.Tensor]
"""Batch of pairs as `SelectionCollator` makes it: tensors `(B, ...)` by name."""


def _check_nothing(values: torch.Tensor, name: str, sample_id: torch.Tensor) -> None:
    """Accept any scores."""


@dataclass(frozen=True)
class LoopHooks:
    """Functions of the loop around a selector; the defaults suit a plain loop.

    Args:
        agree: Function from the number of readable candidates of this rank to the list of those of all ranks. A loop
            can exchange more values between the ranks in the same call, which comes before each selection. With a
            `ShardedLedger`, the number holds another one in its upper 32 bits.
        prepare: Function that is called with a batch on the device of the model, and returns it ready for the model.
        autocast: Function that returns the context of mixed precision.
        measure: Function from the name of a part of the run to a context that measures its time.
        check_finite: Function that raises an error if scores are not finite, from the scores, their name in the error,
            and the sample ids.
    """

    agree: Callable[[int], list[int]] | None = None
    prepare: Callable[[Batch], Batch] | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext
    measure: Callable[[str], AbstractContextManager] = nullcontext
    check_finite: Callable[[torch.Tensor, str, torch.Tensor], None] = _check_nothing

    def exchange_size(self, num_good: int, ranks: Ranks) -> list[int]:
        """Return the number of readable candidates of each rank, from that of this rank."""
        if self.agree is not None:
            return self.agree(num_good)
        return ranks.gather_numbers(num_good).flatten().tolist()

    def exchange_route(self, num_good: int, fullest: int, ranks: Ranks) -> tuple[list[int], int]:
        """Return the number of candidates of each rank, and the largest `Route.fullest` of all, in one exchange."""
        both = self.exchange_size(num_good | fullest << 32, ranks)
        return [number & (2**32 - 1) for number in both], max(number >> 32 for number in both)

    def move(self, model: nn.Module, batch: Batch) -> Batch:
        """Return a batch on the device of the model."""
        device = next(model.parameters()).device
        if device.type != "cpu":  # weights may be kept on the CPU for a model that runs elsewhere
            # From page-locked memory, the copy runs while the host prepares what follows.
            batch = {name: value.to(device, non_blocking=value.device.type == "cpu") for name, value in batch.items()}
        return batch if self.prepare is None else self.prepare(batch)
