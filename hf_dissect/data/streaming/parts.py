"""Which rows of a stream fall to which reader in each pass, and the place in them that a reader can come back to."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from hf_dissect.data.pair_columns import NO_ROWS
from hf_dissect.data.streaming.pair_stream import PairStream

_COUNTING = {"TakeExamplesIterable", "SkipExamplesIterable"}
_SHUFFLING = {"BufferShuffledExamplesIterable"}


class Place(NamedTuple):
    """The place of one pair in a part of a stream; made of what JSON knows.

    Args:
        pass_number: passes of the part before this one.
        shard: shards of this pass that the part has read to the end.
        row: rows of the open shard before the pair's own row, those of other parts included.
        pair: pairs of that row before it.
        source: `state_dict()` of the open shard before that row, None at its beginning.
    """

    pass_number: int = 0
    shard: int = 0
    row: int = 0
    pair: int = 0
    source: dict[str, Any] | None = None


class StreamPart:
    """One of several parts that a stream is split into: one for each worker of each process.

    In each pass every row falls to exactly one part. With at least as many shards as parts, a part gets whole shards;
    with fewer, the parts that share a shard take turns at its rows, and each of them reads all of it. Shares go
    round from pass to pass, so that shards of unequal size are seen equally often in the long run.

    Args:
        stream: the whole stream.
        part: number of this part, from 0.
        num_parts: of all processes and workers.
        seed: numbers that the order of the shards depends on, the same for all parts; None leaves them in order.
    """

    def __init__(self, stream: PairStream, part: int, num_parts: int, seed: Sequence[int] | None):
        self.stream = stream
        self.part = part
        self.num_parts = num_parts
        self.seed = seed
        self._num_shards = num_separate_shards(stream.rows)
        self._shuffles_itself = shuffles_itself(stream.rows)

    def read(self, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Pairs from a place onward, each with its own place; passes follow each other without end.

        Raises:
            ValueError: the stream has no rows, or what reading a row raises.
        """
        known_to_have_rows = place != Place(place.pass_number)
        for pass_number in itertools.count(place.pass_number):
            for placed in self._read_pass(place if pass_number == place.pass_number else Place(pass_number)):
                known_to_have_rows = True
                yield placed
            if not known_to_have_rows:
                # This share may be empty and the next one not: there are fewer rows than parts, or shards without any.
                if next(self.stream.rows.iter(batch_size=1), None) is None:
                    raise ValueError(NO_ROWS)
                known_to_have_rows = True

    def _read_pass(self, begin: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
        shards, offset, step = self._share(begin.pass_number)
        for position in range(begin.shard, len(shards)):
            place = begin if position == begin.shard else Place(begin.pass_number, position)
            # A new object for each shard and pass, as one that was read does not forget its state.
            shard = self.stream.rows.shard(num_shards=self._num_shards, index=int(shards[position]))
            if self._shuffles_itself:
                shard.set_epoch(begin.pass_number)
            if place.source is not None:
                shard.load_state_dict(place.source)
            source = place.source
            # `iter(batch_size=1)` and not `iter(shard)`: in a torch worker the latter splits the rows among the
            # workers once more, although each worker has a part of its own already.
            for row, values in enumerate(shard.iter(batch_size=1), start=place.row):
                if row % step == offset:
                    pairs = enumerate(self.stream.pairs_of({name: value[0] for name, value in values.items()}))
                    before = place.pair if row == place.row else 0
                    for number, pair in pairs:
                        if number >= before:
                            yield Place(begin.pass_number, position, row, number, source), pair
                source = shard.state_dict()

    def _share(self, pass_number: int) -> tuple[np.ndarray, int, int]:
        """Shards to read in a pass, and offset and step of the rows to take from each."""
        order = np.arange(self._num_shards)
        if self.seed is not None:
            order = np.random.default_rng((*self.seed, pass_number)).permutation(order)
        turn = (self.part + pass_number) % self.num_parts
        if len(order) >= self.num_parts:
            return order[turn :: self.num_parts], 0, 1
        shared = turn % len(order)
        return order[shared : shared + 1], turn // len(order), len(range(shared, self.num_parts, len(order)))


def num_separate_shards(rows: datasets.IterableDataset) -> int:
    """Into how many shards a stream can be taken apart without changing which rows it has.

    `take` and `skip` count over the whole stream; split over its shards, they would leave other rows.
    """
    return 1 if _COUNTING & steps_of(rows) else max(1, rows.num_shards)


def check_whole(rows: datasets.IterableDataset) -> None:
    """Make sure that a stream is still to be split.

    Raises:
        ValueError: it holds the rows of one process only, see `datasets.distributed.split_dataset_by_node`.
    """
    if rows._distributed is not None:
        raise ValueError(
            f"The stream is split over {rows._distributed.world_size} processes already (split_dataset_by_node); pass "
            "the whole stream, it is split here."
        )


def shuffles_itself(rows: datasets.IterableDataset) -> bool:
    """Whether a stream has a shuffle buffer of its own, whose content its state does not hold."""
    return bool(_SHUFFLING & steps_of(rows))


def steps_of(rows: datasets.IterableDataset) -> set[str]:
    """Names of the steps that a stream is made of, such as `TakeExamplesIterable`."""
    return set(_names(rows._ex_iterable))


def _names(step: Any) -> Iterator[str]:
    # `state_dict()` names the steps, too, but not those below a concatenation or an interleaving.
    yield type(step).__name__
    for inner in [*getattr(step, "ex_iterables", ()), *filter(None, [getattr(step, "ex_iterable", None)])]:
        yield from _names(inner)
