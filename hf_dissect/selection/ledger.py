"""The ledger: values of each pair that are remembered between visits, so that a pair is compared with its own past."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from hf_dissect.selection.growing_tensor import GrowingTensor
from hf_dissect.selection.id_index import UNKNOWN, IdIndex
from hf_dissect.selection.saved_ledger import (
    LEDGER_FILE,
    SavedLedger,
    check_same_ids,
    fill_missing,
    read_ledger,
    write_ledger,
)

__all__ = ["LEDGER_FILE", "SampleLedger", "SavedLedger", "read_ledger"]


class SampleLedger:
    """Columns of float32 keyed by sample id; a pair that was never written reads as NaN.

    With `num_samples`, ids are the row numbers `0 .. num_samples - 1` and address the columns directly, which takes 4
    bytes per pair and column. Without it, any non-negative int64 ids are accepted (hashed keys, streams), and the
    ledger grows with the pairs it meets. The index (`IdIndex`) then takes 16 to 24 bytes per pair, and up to 32 while
    it grows, whatever the number of columns.

    The columns of a row-number ledger are in shared memory, so that collator workers read what the training process
    writes. The ledger knows nothing of strategies, which choose names and meanings of the columns.

    Args:
        num_samples: Number of pairs if ids are row numbers, None for arbitrary ids.
        columns: Names of the columns.

    Raises:
        ValueError: If `num_samples` is below 1, or the column names are missing or repeated.
    """

    def __init__(self, num_samples: int | None = None, columns: tuple[str, ...] = ("correlation",)) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(
                f"num_samples={num_samples}: a ledger needs at least one pair, or None for arbitrary ids."
            )
        if not columns or len(set(columns)) != len(columns):
            raise ValueError(f"columns={columns!r}: give at least one name, each once.")
        self.num_samples = num_samples
        self._index = None if num_samples is not None else IdIndex()
        self._columns: dict[str, Any] = {name: self._new_column() for name in columns}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def __len__(self) -> int:
        """Return the number of pairs that can be read: all row numbers, or the ids met so far."""
        return self._num_rows if self._index is None else len(self._index)

    @property
    def ids(self) -> torch.Tensor:
        """All ids, int64 `(len(self),)`, in the order of the columns' values."""
        return torch.arange(self._num_rows) if self._index is None else self._index.ids()

    def column(self, name: str) -> torch.Tensor:
        """Return a whole column, float32 `(len(self),)`, for reading."""
        column = self._column(name)
        return column if self._index is None else column.whole()

    def read(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the values of some pairs in a column.

        Args:
            name: Name of the column.
            sample_id: Ids of the pairs, int64 `(B,)`.

        Returns:
            Values, float32 `(B,)` on the CPU, NaN for a pair that was never written.
        """
        column = self._column(name)
        slots = self._slots(sample_id)
        if self._index is None:
            return column[slots]
        if not len(column):
            return torch.full(slots.shape, torch.nan)
        return torch.where(slots == UNKNOWN, torch.nan, column[slots.clamp_min(0)])

    def read_columns(self, names: Sequence[str], sample_id: torch.Tensor) -> torch.Tensor:
        """Return the values of some pairs in several columns, float32 `(B, columns)`, by one look-up; see `read`."""
        slots = self._slots(sample_id)
        is_known, slots = slots != UNKNOWN, slots.clamp_min(0)
        if not len(self):
            return torch.full((len(slots), len(names)), torch.nan)
        values = torch.stack([self._column(name)[slots] for name in names], dim=1)
        return torch.where(is_known[:, None], values, torch.nan)

    @property
    def own(self) -> "SampleLedger":
        """Ledger of the pairs that this process holds: this one, which holds all."""
        return self

    def is_own(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Return a mask of the pairs that this process holds, bool `(B,)`: all of them."""
        return torch.ones(len(sample_id), dtype=torch.bool)

    def read_anywhere(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the values of pairs that are the same on every rank, `(B,)`; every rank calls this method."""
        return self.read(name, sample_id)

    def find_known(self, name: str, by: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pairs with a value in a column, in the order of their ids, which no number of processes changes.

        Statistics of a whole epoch are computed from these values. Every rank calls this method.

        Args:
            name: Name of the column whose values are returned.
            by: Name of the column that a pair must have a value in; None for `name`.

        Returns:
            Ids int64 `(n,)`, and values float32 `(n,)`.
        """
        (places,) = (~self.column(by or name).isnan()).nonzero(as_tuple=True)
        ids = self.ids[places]
        if self._index is not None:
            order = ids.argsort()
            ids, places = ids[order], places[order]
        return ids, self.column(name)[places]

    def compute_mean(self, name: str) -> float:
        """Return the mean of the known values of a column, NaN without any; every rank calls this method."""
        if self.num_samples is not None:
            return float(self.column(name).double().nanmean())
        return float(self.find_known(name)[1].double().mean())

    def replace_computed(self, name: str, compute: Callable[["SampleLedger"], torch.Tensor]) -> None:
        """Replace a whole column by what is computed from the ledger; every rank calls this method.

        Arithmetic on many values at once may round the last of them differently. So they are in the order of the ids,
        whatever the number of ranks.

        Args:
            name: Name of the column.
            compute: Function from the ledger to values `(len(self),)`, in the order of `ids`.
        """
        if self._index is None:
            self.replace(name, compute(self))
            return
        view = _LedgerById(self)
        values = torch.empty(len(self))
        values[view.order] = compute(view)
        self.replace(name, values)

    def wait(self) -> None:
        """Wait until what was begun is written: nothing here, as nothing is exchanged."""

    def write(self, name: str, sample_id: torch.Tensor, values: torch.Tensor) -> None:
        """Set the values of some pairs in a column.

        Args:
            name: Name of the column.
            sample_id: Ids of the pairs, int64 `(B,)`; the last value of a repeated id stays.
            values: Values, `(B,)`, of any type and on any device.

        Raises:
            ValueError: If the number of values is not that of the ids.
        """
        values = values.detach().to("cpu", torch.float32)
        if values.shape != sample_id.shape:
            raise ValueError(f"{len(values)} values for {len(sample_id)} sample ids; give one value per id.")
        column, slots = self._column(name), self._slots(sample_id, insert=True)
        if self._index is None:
            # index_put_ does not define the winner of a repeated index; NumPy assignment does, the last.
            column.numpy()[slots.numpy()] = values.numpy()
        else:
            column[slots] = values

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Replace a whole column.

        Args:
            name: Name of the column.
            values: Values, `(len(self),)`, in the order of `ids`.

        Raises:
            ValueError: If the number of values is not that of the pairs.
        """
        if values.shape != (len(self),):
            raise ValueError(f"{tuple(values.shape)} values for a column of {len(self)} pairs; give one value a pair.")
        column = self._column(name)
        if self._index is None:
            column.copy_(values)
        else:
            self._columns[name] = self._new_column()
            self._columns[name].extend(values.detach().to("cpu", torch.float32))

    def save(self, path: str | os.PathLike[str], metadata: dict[str, object] | None = None) -> None:
        """Write the ledger as safetensors, under a temporary name first, so that the file is whole or absent.

        Args:
            path: File to write.
            metadata: Data for JSON to save with the ledger.
        """
        write_ledger(Path(path), self.as_saved(metadata))

    def as_saved(self, metadata: dict[str, object] | None = None) -> SavedLedger:
        """Return the content as it is saved."""
        columns = {name: self.column(name) for name in self._columns}
        return SavedLedger(self.num_samples, self.ids, columns, metadata or {})

    def load(self, path: str | os.PathLike[str]) -> dict[str, object]:
        """Replace the content by that of a saved ledger.

        Args:
            path: File that `save` wrote, or in whose place several processes wrote shards.

        Returns:
            The metadata that was saved with it.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a ledger, is damaged, or belongs to another number of pairs or kind of ids.
        """
        saved = read_ledger(path)
        check_same_ids(Path(path), saved, self.num_samples)
        self.restore(saved)
        return saved.metadata

    def restore(self, saved: SavedLedger) -> None:
        """Replace the content by a saved one, of the same kind of ids."""
        if self._index is not None:
            self._index = IdIndex.from_ids(saved.ids)
        for name, values in fill_missing(saved.columns, self.columns, len(self)).items():
            if self._index is None:
                self._columns[name].copy_(values)
            else:
                self._columns[name] = self._new_column()
                self._columns[name].extend(values)

    def _new_column(self) -> torch.Tensor | GrowingTensor:
        if self._index is not None:
            return GrowingTensor(np.float32)
        return torch.full((self._num_rows,), torch.nan).share_memory_()

    @property
    def _num_rows(self) -> int:
        return cast(int, self.num_samples)

    def _column(self, name: str) -> Any:
        if name not in self._columns:
            raise KeyError(f"The ledger has no column {name!r}; its columns are {', '.join(self._columns)}.")
        return self._columns[name]

    def _slots(self, sample_id: torch.Tensor, insert: bool = False) -> torch.Tensor:
        sample_id = sample_id.detach().to("cpu", torch.int64)
        if self._index is not None:
            if not insert:
                return self._index.find(sample_id)
            known = len(self)
            slots = self._index.insert(sample_id)
            for column in self._columns.values():
                column.extend(torch.full((len(self) - known,), torch.nan))
            return slots
        if len(sample_id) and (sample_id.min() < 0 or sample_id.max() >= self._num_rows):
            wrong = sample_id[(sample_id < 0) | (sample_id >= self._num_rows)][0].item()
            raise ValueError(f"sample_id {wrong} is outside 0 .. {self._num_rows - 1}, the row numbers of the data.")
        return sample_id


class _LedgerById(SampleLedger):
    """The pairs of a ledger of arbitrary ids, in the order of their ids, for reading."""

    def __init__(self, ledger: SampleLedger) -> None:
        self._ledger = ledger
        self.num_samples = None
        self.order = ledger.ids.argsort()

    @property
    def columns(self) -> tuple[str, ...]:
        return self._ledger.columns

    def __len__(self) -> int:
        return len(self.order)

    @property
    def ids(self) -> torch.Tensor:
        return self._ledger.ids[self.order]

    def column(self, name: str) -> torch.Tensor:
        return self._ledger.column(name)[self.order]

    def read(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        return self._ledger.read(name, sample_id)
