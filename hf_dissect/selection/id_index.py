"""Where the values of a pair stand in the ledger, when pairs are known by arbitrary ids."""

import numpy as np
import torch

from hf_dissect.selection.growing_tensor import GrowingTensor

UNKNOWN = -1
_AT_ONCE = 2**20
# A table is followed by one of twice the size when it is half full; the next one is begun at three eighths. Of the
# positions of the table, eight are taken over with each id that is inserted: all of them until it is half full.
_BEGIN, _TAKEN_OVER = 3 / 8, 8


class IdIndex:
    """Open-addressing hash table from non-negative int64 ids to consecutive slots, vectorised over a batch.

    A larger table is filled in the order of the positions while the old one is still in use, a few with each batch
    that is inserted, so that no step waits for all of them and memory is taken as slowly. An id takes 8 bytes, the
    table 8 to 16 for each id, and up to 24 while it is followed by the next.
    """

    def __init__(self):
        self._ids = GrowingTensor(np.int64)
        self._table = _empty_table(1024)  # slot + 1; 0 where there is none
        self._next_table: torch.Tensor | None = None
        self._taken_over = 0  # positions of the table that the next one has
        self._last_ids = self._last_slots = torch.empty(0, dtype=torch.int64)

    @classmethod
    def of(cls, ids: torch.Tensor) -> "IdIndex":
        """An index of int64 `(n,)`, all different, that gives them the slots `0 .. n - 1`."""
        index = cls()
        index._ids.extend(ids)
        index._table = _empty_table(_table_size(len(ids), len(index._table)))
        for start in range(0, len(ids), _AT_ONCE):
            index._place(index._table, torch.arange(start, min(start + _AT_ONCE, len(ids))))
        return index

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> torch.Tensor:
        """All ids, int64 `(len(self),)`, in the order of their slots."""
        return self._ids.whole()

    def find(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Slots int64 `(B,)` of ids int64 `(B,)`, `UNKNOWN` where there is none."""
        if torch.equal(sample_id, self._last_ids):  # a step writes and reads several columns of the same pairs
            return self._last_slots.clone()
        slots = torch.full(sample_id.shape, UNKNOWN, dtype=torch.int64)
        pending, position = torch.arange(len(sample_id)), _home(sample_id, self._table)
        while len(pending):
            slot = self._table[position].long() - 1
            occupied = slot != UNKNOWN
            pending, position, slot = pending[occupied], position[occupied], slot[occupied]
            found = self._ids[slot] == sample_id[pending]
            slots[pending[found]] = slot[found]
            pending, position = pending[~found], (position[~found] + 1) & (len(self._table) - 1)
        return slots

    def insert(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Slots int64 `(B,)` of ids int64 `(B,)`; the unknown ones get the next free slots.

        Raises:
            ValueError: an id is negative.
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
            self._take_over(_TAKEN_OVER * len(sample_id))
        self._last_ids, self._last_slots = sample_id.clone(), slots.clone()
        return slots

    def _append(self, unknown: torch.Tensor) -> None:
        first, count = len(self), len(self) + len(unknown)
        if _table_size(count, len(self._table)) > len(self._table):
            self._use_next_table(count)
        self._ids.extend(unknown)
        slots = torch.arange(first, count)
        position = self._place(self._table, slots)
        if self._next_table is not None:
            self._place(self._next_table, slots[position < self._taken_over])
        elif count > _BEGIN * len(self._table):
            self._next_table, self._taken_over = _empty_table(2 * len(self._table)), 0

    def _use_next_table(self, count: int) -> None:
        """Go on with a table for `count` ids; a batch as large as all before may leave most of it to be filled."""
        size = _table_size(count, len(self._table))
        if self._next_table is None or len(self._next_table) < size:
            self._next_table, self._taken_over = _empty_table(size), 0
        self._take_over(len(self._table))

    def _take_over(self, number: int) -> None:
        """Enter what stands at the next `number` positions into the next table; after the last, go on with that."""
        end = min(self._taken_over + number, len(self._table))
        for start in range(self._taken_over, end, _AT_ONCE):
            part = self._table[start : min(start + _AT_ONCE, end)]
            self._place(self._next_table, part[part != 0].long() - 1)
        self._taken_over = end
        if end == len(self._table):
            self._table, self._next_table = self._next_table, None

    def _place(self, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Enter `slots`, int64 `(n,)`, into a table; returns their positions."""
        places = _home(self._ids[slots], table)
        pending = torch.arange(len(slots))
        while len(pending):
            position, entry = places[pending], (slots[pending] + 1).int()
            free = table[position] == 0
            table[position[free]] = entry[free]
            # Two ids may have claimed one free position; whoever is not there now moves on.
            pending = pending[table[position] != entry]
            places[pending] = (places[pending] + 1) & (len(table) - 1)
        return places


def _empty_table(size: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros(size, np.int32))  # zeros that take no memory until they are written to


def _table_size(count: int, size: int) -> int:
    while count * 2 > size:
        size *= 2
    return size


def _home(sample_id: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    # Fibonacci hashing: consecutive ids spread over the table; the high bits are the well-mixed ones. A table of twice
    # the size keeps the order, so that taking one over walks through both.
    bits = (len(table) - 1).bit_length()
    mixed = sample_id * -7046029254386353131
    return (mixed >> (64 - bits)) & (len(table) - 1)
