"""A shuffle of a stream that can stop at any pair and go on with the next one, bit for bit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hf_dissect.data.streaming.parts import Place

PlacedPairs = Iterator[tuple[Place, dict[str, Any]]]


@dataclass
class BlockState:
    """Where a `BlockShuffle` stands: its current block is read again from `start`, all else follows.

    Args:
        start: place of the first pair of the block.
        block: blocks before it in its pass.
        given: pairs of it that were given out.
        last_pass: pass of the last pair that was given out, from 0.
    """

    start: Place = field(default_factory=Place)
    block: int = 0
    given: int = 0
    last_pass: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "start": self.start._asdict()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "BlockState":
        return cls(**{**saved, "start": Place(**saved["start"])})


class BlockShuffle:
    """Pairs in blocks: while those of one block are given out in a random order, the next block is read.

    The next block fills as fast as the current one drains: there are never more than about `block_size` pairs in
    memory, and nobody waits for a whole block but the first. No block reaches over the end of a pass.

    Args:
        read: gives the pairs from a place onward, without end.
        block_size: pairs in a block, the last one of a pass excepted.
        seed: numbers that the orders depend on; None leaves the pairs in order.
        state: where to go on.
    """

    def __init__(
        self, read: Callable[[Place], PlacedPairs], block_size: int, seed: Sequence[int] | None, state: BlockState
    ):
        self.block_size = block_size
        self.seed = seed
        self.state = state
        self._unread = read(state.start)
        self._waiting = next(self._unread)
        if self._waiting[0].pass_number != state.start.pass_number:  # the part has no rows in the passes between
            self.state = state = replace(state, start=self._waiting[0])
        self._pairs = self._shuffled(self._read_more([], state.start, block_size))
        self._pairs[: state.given] = [None] * state.given
        self._begin_next()

    def __iter__(self) -> "BlockShuffle":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next pair; `state` is then where the one after it is found."""
        state = self.state
        pair, self._pairs[state.given] = self._pairs[state.given], None
        given = state.given + 1
        self._read_more(self._next, self._next_start, math.ceil(self.block_size * given / len(self._pairs)))
        self.state = BlockState(state.start, state.block, given, state.start.pass_number)
        if given == len(self._pairs):
            same_pass = self._next_start.pass_number == state.start.pass_number
            self.state = BlockState(self._next_start, state.block + 1 if same_pass else 0, 0, state.start.pass_number)
            self._pairs = self._shuffled(self._next)
            self._begin_next()
        return pair

    def _begin_next(self) -> None:
        self._next, self._next_start = [], self._waiting[0]
        self._read_more(self._next, self._next_start, math.ceil(self.block_size * self.state.given / len(self._pairs)))

    def _read_more(self, pairs: list, start: Place, wanted: int) -> list:
        """Read pairs of the pass of `start` until there are as many as wanted, or the pass ends."""
        while len(pairs) < wanted and self._waiting[0].pass_number == start.pass_number:
            pairs.append(self._waiting[1])
            self._waiting = next(self._unread)
        return pairs

    def _shuffled(self, pairs: list) -> list:
        if self.seed is None:
            return pairs
        key = (*self.seed, self.state.start.pass_number, self.state.block)
        return [pairs[index] for index in np.random.default_rng(key).permutation(len(pairs))]
