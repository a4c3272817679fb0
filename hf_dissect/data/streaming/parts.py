"""Divide the rows of a stream among its readers in each pass, and let a reader return to any place in them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from hf_dissect.data.pair_columns import NO_ROWS
from hf_dissect.data.shards.skipped import describe_all_skipped, record_skipped
from hf_dissect.data.streaming.pair_stream import PairStream

_COUNTING = {"TakeExamplesIterable", "SkipExamplesIterable"}
_SHUFFLING = {"BufferShuffledExamplesIterable"}
_MOST_EMPTY = 1000
"""Number of passes over a part of a stream without a visit after which a run gives up."""


PLACE_KEY = "place"
"""Key of a pair of a balanced stream, before it is collated, with its place in the stream."""


class Place(NamedTuple):
    """The place of one pair in a part of a stream, in types that JSON has.

    Args:
        pass_number: Number of passes of the part before this one.
        shard: Number of shards that the part has read to the end in this pass.
        row: Number of rows of the open shard before the pair's own row, including rows of other parts.
        pair: Number of pairs of that row before the pair.
        source: `state_dict()` of the open shard before that row; None at its beginning.
    """

    pass_number: int = 0
    shard: int = 0
    row: int = 0
    pair: int = 0
    source: dict[str, Any] | None = None


class StreamPart:
    """The part of a stream that one worker of one process reads.

    In each pass every row falls to exactly one part. With at least as many shards as parts, a part gets whole shards.
    With fewer, several parts share a shard: each reads all of it and takes its rows in turn with the others. The
    shares rotate from pass to pass, so that shards of unequal size are seen equally often in the long run.

    Args:
        stream: Whole stream.
        part: Number of this part, from 0.
        num_parts: Number of parts, which is that of all workers of all processes.
        seed: Numbers on which the order of the shards depends, equal for all parts; None keeps the order of the data.

    Attributes:
        skipped_shards: Shards that were not read to their end so far, with the reason.
    """

    def __init__(self, stream: PairStream, part: int, num_parts: int, seed: Sequence[int] | None) -> None:
        self.stream = stream
        self.part = part
        self.num_parts = num_parts
        self.seed = seed
        self.skipped_shards: dict[str, str] = {}
        self._num_shards = count_separate_shards(stream.rows)
        self._has_own_shuffle = has_own_shuffle(stream.rows)

    def read(self, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Yield the pairs from a place onward, each with its own place, pass after pass without end.

        Raises:
            ValueError: If the stream has no rows, or a row or shard is unusable.
        """
        known_to_have_rows, num_empty = place != Place(place.pass_number), 0
        for pass_number in itertools.count(place.pass_number):
            has_pairs = False
            num_empty += 1
            for placed in self._read_pass(place if pass_number == place.pass_number else Place(pass_number)):
                known_to_have_rows = has_pairs = True
                num_empty = 0
                yield placed
            if self.stream.balance is not None:
                if pass_number - place.pass_number + 1 >= self.num_parts:  # each part has read all rows by then
                    self.stream.balance.check_known()
                if num_empty == _MOST_EMPTY:
                    raise ValueError(
                        f"data.sampling_file {self.stream.balance.weights.name!r}: {num_empty} passes over a part of "
                        "the data visited no pair; its weights are (nearly) 0. Use fewer workers or larger weights."
                    )
            # With skipped shards, rows there were before may be gone, such as those of a server that is down.
            if not known_to_have_rows or (self.skipped_shards and not has_pairs):
                # An empty share does not prove an empty stream: rows may be fewer than parts, or shards empty.
                if next(self.stream.rows.iter(batch_size=1), None) is None:
                    raise ValueError(NO_ROWS + describe_all_skipped(self.skipped_shards))
                known_to_have_rows = True

    def _read_pass(self, begin: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
        shards, offset, step = self._choose_share(begin.pass_number)
        for position in range(begin.shard, len(shards)):
            place = begin if position == begin.shard else Place(begin.pass_number, position)
            # A new object for each shard and pass, since one that has been read keeps its state.
            shard = self.stream.rows.shard(num_shards=self._num_shards, index=int(shards[position]))
            if self._has_own_shuffle:
                shard.set_epoch(begin.pass_number)
            if place.source is not None:
                shard.load_state_dict(place.source)
            source = place.source
            # `iter(batch_size=1)` and not `iter(shard)`: in a torch worker the latter splits the rows among the
            # workers a second time, although each worker has its own part.
            rows = record_skipped(shard.iter(batch_size=1), self.skipped_shards)
            for row, values in enumerate(rows, start=place.row):
                if row % step == offset:
                    values = {name: value[0] for name, value in values.items()}
                    pairs = enumerate(self.stream.make_visits(values, begin.pass_number))
                    before = place.pair if row == place.row else 0
                    for number, pair in pairs:
                        if number >= before:
                            yield self._put(Place(begin.pass_number, position, row, number, source), pair)
                source = shard.state_dict()

    def _put(self, place: Place, pair: dict[str, Any]) -> tuple[Place, dict[str, Any]]:
        # A copy may wait for a later batch, and is then read again after a resume.
        return place, pair if self.stream.balance is None else {**pair, PLACE_KEY: place}

    def _choose_share(self, pass_number: int) -> tuple[np.ndarray, int, int]:
        """Return the shards to read in a pass, and offset and step of the rows to take from each."""
        order = np.arange(self._num_shards)
        if self.seed is not None:
            order = np.random.default_rng((*self.seed, pass_number)).permutation(order)
        turn = (self.part + pass_number) % self.num_parts
        if len(order) >= self.num_parts:
            return order[turn :: self.num_parts], 0, 1
        shared = turn % len(order)
        return order[shared : shared + 1], turn // len(order), len(range(shared, self.num_parts, len(order)))


def count_separate_shards(rows: datasets.IterableDataset) -> int:
    """Return the number of shards that a stream can be divided into and still have the same rows.

    That is 1 for a stream with a `take` or `skip`, which counts over the whole stream: divided into its shards, it
    would keep other rows.
    """
    return 1 if _COUNTING & list_steps(rows) else max(1, rows.num_shards)


def check_whole(rows: datasets.IterableDataset) -> None:
    """Check that a stream holds the rows of all processes.

    Raises:
        ValueError: If `datasets.distributed.split_dataset_by_node` has split it.
    """
    if rows._distributed is not None:
        raise ValueError(
            f"The stream is split over {rows._distributed.world_size} processes already (split_dataset_by_node); pass "
            "the whole stream, it is split here."
        )


def has_own_shuffle(rows: datasets.IterableDataset) -> bool:
    """Return whether a stream has its own shuffle buffer, whose content is not part of its state."""
    return bool(_SHUFFLING & list_steps(rows))


def list_steps(rows: datasets.IterableDataset) -> set[str]:
    """Return the names of the steps that make up a stream, such as `TakeExamplesIterable`."""
    return set(_walk_step_names(rows._ex_iterable))


def _walk_step_names(step: Any) -> Iterator[str]:
    # `state_dict()` also names the steps, except those below a concatenation or an interleaving.
    yield type(step).__name__
    for inner in [*getattr(step, "ex_iterables", ()), *filter(None, [getattr(step, "ex_iterable", None)])]:
        yield from _walk_step_names(inner)
