"""What is remembered of each pair between visits, so that a pair can be compared with its own past."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

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

    With `num_samples`, ids are the row numbers `0 .. num_samples - 1` and address the columns directly: 4 bytes a
    pair and column, nothing else. Without it any non-negative int64 ids are accepted (hashed keys, streams) and the
    ledger grows with the pairs it meets; the index (`IdIndex`) then costs 16 to 24 bytes a pair, and up to 32 while
    it grows, once, whatever the number of columns.

    The columns of a row-number ledger lie in shared memory, so that collator workers read what the training process
    writes. The ledger knows nothing of strategies: they choose names and meanings of the columns.

    Args:
        num_samples: number of pairs when ids are row numbers, `None` for arbitrary ids.
        columns: names of the columns.

    Raises:
        ValueError: for fewer than one sample, or no or repeated column names.
    """

    def __init__(self, num_samples: int | None = None, columns: tuple[str, ...] = ("correlation",)):
        if num_samples is not None and num_samples < 1:
            raise ValueError(
                f"num_samples={num_samples}: a ledger needs at least one pair, or None for arbitrary ids."
            )
        if not columns or len(set(columns)) != len(columns):
            raise ValueError(f"columns={columns!r}: give at least one name, each once.")
        self.num_samples = num_samples
        self._index = None if num_samples is not None else IdIndex()
        self._columns = {name: self._new_column() for name in columns}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def __len__(self) -> int:
        """Number of pairs that can be read: all row numbers, or the ids met so far."""
        return self.num_samples if self._index is None else len(self._index)

    @property
    def ids(self) -> torch.Tensor:
        """All ids, int64 `(len(self),)`, in the order of the columns' values."""
        return torch.arange(self.num_samples) if self._index is None else self._index.ids()

    def column(self, name: str) -> torch.Tensor:
        """The whole column, float32 `(len(self),)`, for reading."""
        column = self._column(name)
        return column if self._index is None else column.whole()

    def read(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Values of a column for `sample_id` int64 `(B,)`: float32 `(B,)` on the CPU, NaN where never written."""
        column = self._column(name)
        slots = self._slots(sample_id)
        if self._index is None:
            return column[slots]
        if not len(column):
            return torch.full(slots.shape, torch.nan)
        return torch.where(slots == UNKNOWN, torch.nan, column[slots.clamp_min(0)])

    def write(self, name: str, sample_id: torch.Tensor, values: torch.Tensor) -> None:
        """Set a column for `sample_id` int64 `(B,)` to `values` `(B,)`; of a repeated id the last value stays."""
        values = values.detach().to("cpu", torch.float32)
        if values.shape != sample_id.shape:
            raise ValueError(f"{len(values)} values for {len(sample_id)} sample ids; give one value an id.")
        column, slots = self._column(name), self._slots(sample_id, insert=True)
        if self._index is None:
            # index_put_ leaves the winner of a repeated index open; NumPy assignment defines it as the last.
            column.numpy()[slots.numpy()] = values.numpy()
        else:
            column[slots] = values

    def save(self, path: str | os.PathLike, metadata: dict[str, object] | None = None) -> None:
        """Write the ledger as safetensors, to a temporary name first, so that a half-written file is never found."""
        path = Path(path)
        tensors = {f"column.{name}": self.column(name).contiguous() for name in self._columns}
        if self._index is not None:
            tensors["ids"] = self._index.ids()
        header = {"format": _FORMAT, "metadata": json.dumps(metadata or {})}
        header["num_samples"] = json.dumps(self.num_samples)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)

    def load(self, path: str | os.PathLike) -> dict[str, object]:
        """Replace the content by a saved ledger's and return the metadata that was saved with it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no ledger, is damaged, or belongs to another number of pairs or kind of ids.
        """
        saved = read_ledger(path)
        if saved.num_samples != self.num_samples:
            raise ValueError(
                f"{path} holds {_described(saved.num_samples)}, this run has {_described(self.num_samples)}: it "
                "belongs to another data set. Resume with the data of the first run, or start without a checkpoint."
            )
        self._restore(saved)
        return saved.metadata

    def _restore(self, saved: "SavedLedger") -> None:
        if self._index is not None:
            self._index = IdIndex.of(saved.ids)
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
        return torch.full((self.num_samples,), torch.nan).share_memory_()

    def _column(self, name: str) -> torch.Tensor | GrowingTensor:
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
        if len(sample_id) and (sample_id.min() < 0 or sample_id.max() >= self.num_samples):
            wrong = sample_id[(sample_id < 0) | (sample_id >= self.num_samples)][0].item()
            raise ValueError(f"sample_id {wrong} is outside 0 .. {self.num_samples - 1}, the row numbers of the data.")
        return sample_id


@dataclass(frozen=True)
class SavedLedger:
    """A ledger as it stands in a file.

    Attributes:
        num_samples: number of pairs when ids are row numbers, None for arbitrary ids.
        ids: int64 `(n,)`.
        columns: name -> float32 `(n,)`, NaN where never written.
        metadata: what was saved with it.
    """

    num_samples: int | None
    ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    metadata: dict[str, object]


def read_ledger(path: str | os.PathLike) -> SavedLedger:
    """Read what `SampleLedger.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no ledger, or is damaged.
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


def _described(num_samples: int | None) -> str:
    return "arbitrary ids" if num_samples is None else f"{num_samples} pairs"
