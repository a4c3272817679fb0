"""Shuffle a stream so that it can stop at any pair and resume with the next one, bit for bit.

Written by hand, since a resumed `datasets.IterableDataset.shuffle` loses the content of its buffer and fills it with
new rows: a resumed run would miss pairs and see the others in another order. Here, a resumed run reads its block
again, so that the state is a few numbers and holds no pictures.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hf_dissect.data.streaming.parts import Place

PlacedPairs = Iterator[tuple[Place, dict[str, Any]]]


@dataclass
class BlockState:
    """The state of a `BlockShuffle`, enough to read its current block again and continue in it.

    Args:
        start: Place of the first pair of the block.
        block: Number of blocks before it in its pass.
        given: Number of its pairs that were returned.
        last_pass: Pass of the last pair that was returned, from 0.
    """

    start: Place = field(default_factory=Place)
    block: int = 0
    given: int = 0
    last_pass: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the state in types that JSON has."""
        return {**asdict(self), "start": self.start._asdict()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "BlockState":
        """Make a state from what `to_json` returned."""
        return cls(**{**saved, "start": Place(**saved["start"])})


class BlockShuffle:
    """Endless iterator over pairs that are shuffled in blocks.

    While the pairs of one block are returned in a random order, the next block is read. It fills as fast as the
    current one drains: memory never holds more than about `block_size` pairs, and only the first block is waited for.
    A block ends at the end of a pass.

    Args:
        read: Function that yields the pairs from a place onward, without end.
        block_size: Number of pairs in a block, except the last one of a pass.
        seed: Numbers on which the orders depend; None keeps the order of the data.
        state: State to continue from.
    """

    def __init__(
        self, read: Callable[[Place], PlacedPairs], block_size: int, seed: Sequence[int] | None, state: BlockState
    ) -> None:
        self.block_size = block_size
        self.seed = seed
        self.state = state
        self._unread = read(state.start)
        self._waiting = next(self._unread)
        if self._waiting[0].pass_number != state.start.pass_number:  # the part has no rows in the passes between them
            self.state = state = replace(state, start=self._waiting[0])
        self._pairs = self._shuffle(self._read_more([], state.start, block_size))
        self._pairs[: state.given] = [{}] * state.given  # frees the pictures of pairs that were returned
        self._begin_next()

    def __iter__(self) -> "BlockShuffle":
        return self

    def __next__(self) -> dict[str, Any]:
        """Return the next pair; `state` then leads to the pair after it."""
        state = self.state
        pair, self._pairs[state.given] = self._pairs[state.given], {}
        given = state.given + 1
        self._read_more(self._next, self._next_start, math.ceil(self.block_size * given / len(self._pairs)))
        self.state = BlockState(state.start, state.block, given, state.start.pass_number)
        if given == len(self._pairs):
            same_pass = self._next_start.pass_number == state.start.pass_number
            self.state = BlockState(self._next_start, state.block + 1 if same_pass else 0, 0, state.start.pass_number)
            self._pairs = self._shuffle(self._next)
            self._begin_next()
        return pair

    def _begin_next(self) -> None:
        self._next: list[dict[str, Any]] = []
        self._next_start = self._waiting[0]
        self._read_more(self._next, self._next_start, math.ceil(self.block_size * self.state.given / len(self._pairs)))

    def _read_more(self, pairs: list[dict[str, Any]], start: Place, wanted: int) -> list[dict[str, Any]]:
        """Read pairs of the pass of `start` until there are `wanted` of them or the pass ends."""
        while len(pairs) < wanted and self._waiting[0].pass_number == start.pass_number:
            pairs.append(self._waiting[1])
            self._waiting = next(self._unread)
        return pairs

    def _shuffle(self, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.seed is None:
            return pairs
        key = (*self.seed, self.state.start.pass_number, self.state.block)
        return [pairs[index] for index in np.random.default_rng(key).permutation(len(pairs))]
