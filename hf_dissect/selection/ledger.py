"""What is remembered of each pair between visits, so that a pair can be compared with its own past."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FORMAT = "hf_dissect.ledger/1"
_EMPTY_SLOT = -1


class SampleLedger:
    """Columns of float32 keyed by sample id; a pair that was never written reads as NaN.

    With `num_samples`, ids are the row numbers `0 .. num_samples - 1` and address the columns directly: 4 bytes a
    pair and column, nothing else. Without it any non-negative int64 ids are accepted (hashed keys, streams) and the
    ledger grows with the pairs it meets; the index then costs 8 bytes a pair for the id and 8 to 16 bytes for the
    hash slots, once, whatever the number of columns.

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
        self._index = None if num_samples is not None else _IdIndex()
        size = num_samples if num_samples is not None else 0
        self._columns = {name: torch.full((size,), torch.nan).share_memory_() for name in columns}

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
        """The whole column, float32 `(len(self),)`; a view, for reading."""
        return self._column(name)[: len(self)]

    def read(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Values of a column for `sample_id` int64 `(B,)`: float32 `(B,)` on the CPU, NaN where never written."""
        column = self._column(name)
        slots = self._slots(sample_id)
        if self._index is None:
            return column[slots]
        values = column[slots.clamp_min(0)] if len(column) else torch.full(slots.shape, torch.nan)
        return torch.where(slots == _EMPTY_SLOT, torch.nan, values)

    def write(self, name: str, sample_id: torch.Tensor, values: torch.Tensor) -> None:
        """Set a column for `sample_id` int64 `(B,)` to `values` `(B,)`; of a repeated id the last value stays."""
        values = values.detach().to("cpu", torch.float32)
        if values.shape != sample_id.shape:
            raise ValueError(f"{len(values)} values for {len(sample_id)} sample ids; give one value an id.")
        self._column(name)
        slots = self._slots(sample_id, insert=True)
        # index_put_ leaves the winner of a repeated index open; NumPy assignment defines it as the last.
        self._columns[name].numpy()[slots.numpy()] = values.numpy()

    def save(self, path: str | os.PathLike, metadata: dict[str, object] | None = None) -> None:
        """Write the ledger as safetensors, to a temporary name first, so that a half-written file is never found."""
        path = Path(path)
        tensors = {f"column.{name}": self.column(name).contiguous() for name in self._columns}
        if self._index is not None:
            tensors["ids"] = self._index.ids().contiguous()
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
        if num_samples != self.num_samples:
            raise ValueError(
                f"{path} holds {'arbitrary ids' if num_samples is None else f'{num_samples} pairs'}, this run has "
                f"{'arbitrary ids' if self.num_samples is None else f'{self.num_samples} pairs'}: it belongs to "
                "another data set. Resume with the data of the first run, or start without a checkpoint."
            )
        self._restore(tensors)
        return json.loads(header["metadata"])

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._index is not None:
            self._index = _IdIndex()
            self._grow(self._index.insert(tensors["ids"]))
        for name in self._columns:
            saved = tensors.get(f"column.{name}")
            values = torch.full((len(self),), torch.nan) if saved is None else saved
            self._columns[name][: len(self)] = values

    def _column(self, name: str) -> torch.Tensor:
        if name not in self._columns:
            raise KeyError(f"The ledger has no column {name!r}; its columns are {', '.join(self._columns)}.")
        return self._columns[name]

    def _slots(self, sample_id: torch.Tensor, insert: bool = False) -> torch.Tensor:
        sample_id = sample_id.detach().to("cpu", torch.int64)
        if self._index is not None:
            if not insert:
                return self._index.find(sample_id)
            slots = self._index.insert(sample_id)
            self._grow(slots)
            return slots
        if len(sample_id) and (sample_id.min() < 0 or sample_id.max() >= self.num_samples):
            wrong = sample_id[(sample_id < 0) | (sample_id >= self.num_samples)][0].item()
            raise ValueError(f"sample_id {wrong} is outside 0 .. {self.num_samples - 1}, the row numbers of the data.")
        return sample_id

    def _grow(self, slots: torch.Tensor) -> None:
        size = len(next(iter(self._columns.values())))
        if not len(slots) or (needed := int(slots.max()) + 1) <= size:
            return
        # A quarter more than needed: growth stays rare and the slack stays small.
        capacity = max(1024, needed + needed // 4)
        for name, column in self._columns.items():
            grown = torch.full((capacity,), torch.nan)
            grown[:size] = column
            self._columns[name] = grown


class _IdIndex:
    """Open-addressing hash table from non-negative int64 ids to consecutive slots, vectorised over a batch."""

    def __init__(self):
        self._count = 0
        self._ids = torch.empty(0, dtype=torch.int64)
        self._table = torch.full((1024,), _EMPTY_SLOT, dtype=torch.int32)

    def __len__(self) -> int:
        return self._count

    def ids(self) -> torch.Tensor:
        return self._ids[: self._count]

    def find(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Slots int64 `(B,)` of ids int64 `(B,)`, -1 where unknown."""
        slots = torch.full(sample_id.shape, _EMPTY_SLOT, dtype=torch.int64)
        pending = torch.arange(len(sample_id))
        position = self._home(sample_id)
        while len(pending):
            slot = self._table[position].long()
            occupied = slot != _EMPTY_SLOT
            found = occupied & (self._ids[slot.clamp_min(0)] == sample_id[pending]) if self._count else occupied
            slots[pending[found]] = slot[found]
            further = occupied & ~found
            pending, position = pending[further], (position[further] + 1) & (len(self._table) - 1)
        return slots

    def insert(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Slots int64 `(B,)` of ids int64 `(B,)`; an unknown id gets the next free slot."""
        if len(sample_id) and sample_id.min() < 0:
            raise ValueError(f"sample_id {sample_id.min().item()} is negative; ids are non-negative integers.")
        unknown = torch.unique(sample_id[self.find(sample_id) == _EMPTY_SLOT])
        if len(unknown):
            self._append(unknown)
        return self.find(sample_id)

    def _append(self, unknown: torch.Tensor) -> None:
        first, self._count = self._count, self._count + len(unknown)
        if self._count > len(self._ids):
            grown = torch.empty(self._count + self._count // 4, dtype=torch.int64)
            grown[:first] = self._ids[:first]
            self._ids = grown
        self._ids[first : self._count] = unknown
        if self._count * 2 > len(self._table):
            size = len(self._table)
            while self._count * 2 > size:
                size *= 2
            self._table = torch.full((size,), _EMPTY_SLOT, dtype=torch.int32)
            first = 0
        self._place(torch.arange(first, self._count))

    def _place(self, slots: torch.Tensor) -> None:
        position = self._home(self._ids[slots])
        while len(slots):
            free = self._table[position] == _EMPTY_SLOT
            self._table[position[free]] = slots[free].int()
            # Two ids may have claimed one free position; whoever is not there now moves on.
            homeless = self._table[position] != slots
            slots, position = slots[homeless], (position[homeless] + 1) & (len(self._table) - 1)

    def _home(self, sample_id: torch.Tensor) -> torch.Tensor:
        # Fibonacci hashing: consecutive ids spread over the table; the high bits are the well-mixed ones.
        bits = (len(self._table) - 1).bit_length()
        mixed = sample_id * -7046029254386353131
        return (mixed >> (64 - bits)) & (len(self._table) - 1)
