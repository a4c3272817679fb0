"""Training batches whose pictures have the size of their step, though workers make them steps before it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_dissect.data.image_sizes import ImageSizes
from hf_dissect.data.streaming.loader import StreamLoader

Progress = Callable[[], tuple[int, int]]
"""Function that returns the number of optimiser steps done, and that of the whole run."""


class SizedIndices(list[int]):
    """Indices of a batch, with the size of its pictures; it is pickled on its way to a worker."""

    image_size: int


class SizedRows(list[Any]):
    """Rows of a batch, with the size of their pictures."""

    image_size: int


class SizedBatchSampler:
    """Batch sampler that notes in each batch the size of the pictures at the step for which it is made.

    It counts the batches of an epoch from its beginning, those that a resumed run skips, too, so that the size does
    not depend on how far workers read ahead. The attributes are those of the batch sampler within.

    Args:
        inner: Batch sampler of this rank.
        sizes: Schedule.
        progress: Progress of the run.
        accumulation: Number of batches of an optimiser step.
    """

    def __init__(self, inner: Any, sizes: ImageSizes, progress: Progress, accumulation: int) -> None:
        self._inner = inner
        self._sizes = sizes
        self._progress = progress
        self._accumulation = accumulation

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # before `__init__`, as in a copy
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[SizedIndices]:
        step, max_steps = self._progress()
        steps_per_epoch = -(-len(self._inner) // self._accumulation)
        first = step // steps_per_epoch * steps_per_epoch
        for number, indices in enumerate(self._inner):
            sized = SizedIndices(indices)
            sized.image_size = self._sizes.find(first + number // self._accumulation, max_steps)
            yield sized


class SizedPairs(torch.utils.data.Dataset):
    """Map-style pairs that pass the size of a batch on from its indices to its rows.

    Args:
        pairs: Pairs.
    """

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __getattr__(self, name: str) -> Any:
        if name == "pairs":
            raise AttributeError(name)
        return getattr(self.pairs, name)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """Return the rows of a batch, as `SizedRows` if it has a size."""
        if hasattr(self.pairs, "__getitems__"):
            rows = self.pairs.__getitems__(indices)
        else:
            rows = [self.pairs[index] for index in indices]
        size = getattr(indices, "image_size", None)
        return rows if size is None else _note_size(rows, size)


class SizedPick:
    """Function of a stream's worker that notes in the rows of a batch the size of the pictures at its step.

    Args:
        sizes: Schedule.
        progress: Progress of the run; it is read when the loader begins.
        accumulation: Number of batches of an optimiser step.
        pick: Function that picks the rows to collate; None for all of them.
    """

    def __init__(
        self, sizes: ImageSizes, progress: Progress, accumulation: int, pick: Callable[..., Any] | None = None
    ) -> None:
        self._sizes = sizes
        self._progress: Progress | None = progress
        self._accumulation = accumulation
        self._pick = pick
        self._first = 0
        self._begun = (0, 0)

    def begin(self, number: int) -> "SizedPick":
        """Return a copy for the batches from `number` on, of which the first belongs to the step that comes next."""
        if self._progress is None:
            return self
        copy = SizedPick(self._sizes, self._progress, self._accumulation, self._pick)
        copy._first, copy._begun, copy._progress = number, self._progress(), None  # which cannot be pickled
        return copy

    def __call__(self, rows: list[dict[str, Any]], number: int) -> Any:
        """Return the rows to collate of batch `number` of this process."""
        step, max_steps = self._begun
        size = self._sizes.find(step + (number - self._first) // self._accumulation, max_steps)
        return _note_size(rows if self._pick is None else self._pick(rows, number), size)


class SizedCollator:
    """Collator that has pictures prepared in the size that is noted in the rows.

    Args:
        collate: Collator of the loader, which calls `collator` in the end.
        collator: `SelectionCollator` of the run.
        size: Size of rows without a note; None for the model's own.
    """

    def __init__(self, collate: Callable[[Any], Any], collator: Any, size: int | None = None) -> None:
        self.collate = collate
        self.collator = collator
        self.size = size

    def __call__(self, rows: Any) -> Any:
        """Collate the rows of a batch."""
        at_size: AbstractContextManager = self.collator.at_size(getattr(rows, "image_size", self.size))
        with at_size:
            return self.collate(rows)


def size_batches(loader: Any, sizes: ImageSizes | None, collator: Any, progress: Progress, accumulation: int) -> Any:
    """Return a loader of training batches whose pictures follow a schedule; the loader itself without one.

    Args:
        loader: Loader of map-style or iterable pairs, or of a stream.
        sizes: Schedule; None for the model's own size.
        collator: `SelectionCollator` of the run.
        progress: Progress of the run.
        accumulation: Number of batches of an optimiser step.
    """
    if sizes is None:
        return loader
    if isinstance(loader, StreamLoader):
        loader.pick = SizedPick(sizes, progress, accumulation, loader.pick)
        loader.collator = SizedCollator(loader.collator, collator)
        return loader
    base: DataLoader = getattr(loader, "base_dataloader", loader)  # accelerate wraps a loader
    base.collate_fn = SizedCollator(base.collate_fn, collator, sizes.constant)
    if sizes.constant is None:
        # A loader forbids the change of these two, for it would not reach an iterator that is running; none is.
        object.__setattr__(base, "batch_sampler", SizedBatchSampler(base.batch_sampler, sizes, progress, accumulation))
        object.__setattr__(base, "dataset", SizedPairs(base.dataset))
    return loader


def _note_size(rows: Any, size: int) -> Any:
    if not hasattr(rows, "__dict__"):  # a plain list
        rows = SizedRows(rows)
    rows.image_size = size
    return rows
