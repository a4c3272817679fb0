"""An index from arbitrary ids of pairs to their places in the ledger."""

from typing import cast

import numpy as np
import torch

from hf_dissect.selection.growing_tensor import GrowingTensor

UNKNOWN = -1
_AT_ONCE = 2**20
# A table of twice the size replaces a half-full one; its filling starts at three eighths. Each inserted id moves eight
# positions, so that all positions have moved when the table is half full.
_FILL_FROM, _MOVED_PER_ID = 3 / 8, 8


class IdIndex:
    """Open-addressing hash table from non-negative int64 ids to consecutive slots, vectorised over a batch.

    A larger table is filled in the order of the positions while the old one is still in use, a few positions with each
    inserted batch. No step waits for all of them, and memory is taken as slowly. An id takes 8 bytes, and the table 8
    to 16 for each id; up to 24 while the next table is filled.
    """

    def __init__(self) -> None:
        self._ids = GrowingTensor(np.int64)
        self._table = _empty_table(1024)  # slot + 1; 0 at a free position
        self._next_table: torch.Tensor | None = None
        self._num_moved = 0  # positions already moved to the next table
        self._last_ids = self._last_slots = torch.empty(0, dtype=torch.int64)

    @classmethod
    def from_ids(cls, ids: torch.Tensor) -> "IdIndex":
        """Build an index that assigns the slots `0 .. n - 1`.

        Args:
            ids: Distinct ids, int64 `(n,)`.
        """
        index = cls()
        index._ids.extend(ids)
        index._table = _empty_table(_table_size(len(ids), len(index._table)))
        for start in range(0, len(ids), _AT_ONCE):
            index._place(index._table, torch.arange(start, min(start + _AT_ONCE, len(ids))))
        return index

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> torch.Tensor:
        """Return all ids, int64 `(len(self),)`, in the order of their slots."""
        return self._ids.whole()

    def find(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the slots int64 `(B,)` of ids int64 `(B,)`, `UNKNOWN` for an id that was never inserted."""
        if torch.equal(sample_id, self._last_ids):  # a step accesses several columns of the same pairs
            return self._last_slots.clone()
        slots = torch.full(sample_id.shape, UNKNOWN, dtype=torch.int64)
        pending, position = torch.arange(len(sample_id)), _hash(sample_id, self._table)
        while len(pending):
            slot = self._table[position].long() - 1
            occupied = slot != UNKNOWN
            pending, position, slot = pending[occupied], position[occupied], slot[occupied]
            found = self._ids[slot] == sample_id[pending]
            slots[pending[found]] = slot[found]
            pending, position = pending[~found], (position[~found] + 1) & (len(self._table) - 1)
        return slots

    def insert(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the slots of ids; unknown ids get the next free slots.

        Args:
            sample_id: Ids, int64 `(B,)`.

        Returns:
            Slots, int64 `(B,)`.

        Raises:
            ValueError: If an id is negative.
        """
        if len(sample_id) and sample_id.min() < 0:
            raise ValueError(f"sample_id {sample_id.min().item()} is negative; ids are non-negative integers.")
        slots = self.find(sample_id)
        (missing,) = (slots == UNKNOWN).nonzero(as_tuple=True)
        if len(missing):
            unknown, places = torch.unique(sample_id[missing], return_inverse=True)
            slots[missing] = len(self) + places
            self._append(unknown)
        if self._next_table is not None:
            self._move_entries(_MOVED_PER_ID * len(sample_id))
        self._last_ids, self._last_slots = sample_id.clone(), slots.clone()
        return slots

    def _append(self, unknown: torch.Tensor) -> None:
        first, count = len(self), len(self) + len(unknown)
        if _table_size(count, len(self._table)) > len(self._table):
            self._switch_table(count)
        self._ids.extend(unknown)
        slots = torch.arange(first, count)
        position = self._place(self._table, slots)
        if self._next_table is not None:
            self._place(self._next_table, slots[position < self._num_moved])
        elif count > _FILL_FROM * len(self._table):
            self._next_table, self._num_moved = _empty_table(2 * len(self._table)), 0

    def _switch_table(self, count: int) -> None:
        """Switch to a table for `count` ids; a batch as large as all before may leave most of it to fill."""
        size = _table_size(count, len(self._table))
        if self._next_table is None or len(self._next_table) < size:
            self._next_table, self._num_moved = _empty_table(size), 0
        self._move_entries(len(self._table))

    def _move_entries(self, number: int) -> None:
        """Move the entries at the next `number` positions to the next table, and switch to it after the last."""
        end = min(self._num_moved + number, len(self._table))
        for start in range(self._num_moved, end, _AT_ONCE):
            part = self._table[start : min(start + _AT_ONCE, end)]
            self._place(cast(torch.Tensor, self._next_table), part[part != 0].long() - 1)
        self._num_moved = end
        if end == len(self._table):
            self._table, self._next_table = cast(torch.Tensor, self._next_table), None

    def _place(self, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Enter slots int64 `(n,)` into a table, and return their positions."""
        places = _hash(self._ids[slots], table)
        pending = torch.arange(len(slots))
        while len(pending):
            position, entry = places[pending], (slots[pending] + 1).int()
            free = table[position] == 0
            table[position[free]] = entry[free]
            # Two ids may have claimed one free position; the one that is not there moves to the next.
            pending = pending[table[position] != entry]
            places[pending] = (places[pending] + 1) & (len(table) - 1)
        return places


def _empty_table(size: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros(size, np.int32))  # takes no memory until it is written to


def _table_size(count: int, size: int) -> int:
    while count * 2 > size:
        size *= 2
    return size


def _hash(sample_id: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    # Fibonacci hashing spreads consecutive ids over the table; the high bits are the well-mixed ones. A table of twice
    # the size keeps the order, so that moving entries walks through both tables in sequence.
    bits = (len(table) - 1).bit_length()
    mixed = sample_id * -7046029254386353131
    return (mixed >> (64 - bits)) & (len(table) - 1)
