"""The ledger: values of each pair that are remembered between visits, so that a pair is compared with its own past."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_dissect.selection.growing_tensor import GrowingTensor
from hf_dissect.selection.id_index import UNKNOWN, IdIndex

LEDGER_FILE = "ledger.safetensors"
"""Name of the ledger in a run folder and in its checkpoints."""

_FORMAT = "hf_dissect.ledger/1"


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
        path = Path(path)
        tensors = {f"column.{name}": self.column(name).contiguous() for name in self._columns}
        if self._index is not None:
            tensors["ids"] = self._index.ids()
        header = {"format": _FORMAT, "metadata": json.dumps(metadata or {})}
        header["num_samples"] = json.dumps(self.num_samples)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)

    def load(self, path: str | os.PathLike[str]) -> dict[str, object]:
        """Replace the content by that of a saved ledger.

        Args:
            path: File that `save` wrote.

        Returns:
            The metadata that was saved with it.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a ledger, is damaged, or belongs to another number of pairs or kind of ids.
        """
        saved = read_ledger(path)
        if saved.num_samples != self.num_samples:
            raise ValueError(
                f"{path} holds {_describe_ids(saved.num_samples)}, this run has {_describe_ids(self.num_samples)}: it "
                "belongs to another data set. Resume with the data of the first run, or start without a checkpoint."
            )
        self._restore(saved)
        return saved.metadata

    def _restore(self, saved: "SavedLedger") -> None:
        if self._index is not None:
            self._index = IdIndex.from_ids(saved.ids)
        for name in self._columns:
            values = saved.columns.get(name, torch.full((len(self),), torch.nan))
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


@dataclass(frozen=True)
class SavedLedger:
    """The content of a ledger file.

    Attributes:
        num_samples: Number of pairs if ids are row numbers, None for arbitrary ids.
        ids: Ids of the pairs, int64 `(n,)`.
        columns: Values float32 `(n,)` of each column, NaN for a pair that was never written.
        metadata: Metadata that was saved with the ledger.
    """

    num_samples: int | None
    ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    metadata: dict[str, object]


def read_ledger(path: str | os.PathLike[str]) -> SavedLedger:
    """Read a file that `SampleLedger.save` wrote.

    Args:
        path: File to read.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a ledger, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No ledger at {path}.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a sample ledger (format {header.get('format')!r}, expected {_FORMAT!r}).")
    num_samples = json.loads(header["num_samples"])
    ids = tensors.pop("ids") if num_samples is None else torch.arange(num_samples)
    columns = {name.removeprefix("column."): values for name, values in tensors.items()}
    return SavedLedger(num_samples, ids, columns, json.loads(header["metadata"]))


def _describe_ids(num_samples: int | None) -> str:
    return "arbitrary ids" if num_samples is None else f"{num_samples} pairs"
