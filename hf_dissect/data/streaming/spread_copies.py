"""Batches of a stream in which no pair comes twice, although some are visited several times in a pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hf_dissect.data.streaming.parts import PLACE_KEY, Place

Pair = dict[str, Any]


class SpreadCopies:
    """Reader of batches that lets a copy wait for the next batch if its pair is in this one.

    If as many copies wait as fill `max_waiting` batches, the part has fewer different pairs than a batch, and a batch
    may hold a pair twice, as without balance at the end of a pass.

    Args:
        pairs: Iterator over pairs with a place, without end.
        batch_size: Number of pairs in a batch.
        max_waiting: Number of batches that may wait.
        waiting: Pairs that wait for the first batch.
    """

    def __init__(self, pairs: Iterator[Pair], batch_size: int, max_waiting: int, waiting: Sequence[Pair] = ()) -> None:
        self._pairs = pairs
        self._batch_size = batch_size
        self._most = max_waiting * batch_size
        self._waiting = list(waiting)

    def draw(self) -> list[Pair]:
        """Return the next batch, without the places of its pairs."""
        rows: list[Pair] = []
        ids: set[int] = set()
        still_waiting: list[Pair] = []
        for pair in self._waiting:
            if len(rows) < self._batch_size and pair["sample_id"] not in ids:
                rows.append(pair)
                ids.add(pair["sample_id"])
            else:
                still_waiting.append(pair)
        while len(rows) < self._batch_size:
            pair = next(self._pairs)
            if pair["sample_id"] in ids and len(still_waiting) < self._most:
                still_waiting.append(pair)
            else:
                rows.append(pair)
                ids.add(pair["sample_id"])
        self._waiting = still_waiting
        return [{name: value for name, value in row.items() if name != PLACE_KEY} for row in rows]

    def list_places(self) -> list[dict[str, Any]]:
        """Return the places of the pairs that wait, in types that JSON has."""
        return [pair[PLACE_KEY]._asdict() for pair in self._waiting]


def read_again(read: Callable[[Place], Iterator[tuple[Place, Pair]]], places: Sequence[dict[str, Any]]) -> list[Pair]:
    """Read the pairs at some places of a part again, in one go from the first of them.

    Args:
        read: Function that yields the pairs of the part from a place onward.
        places: Places as `list_places` returned them.
    """
    wanted = [Place(**place) for place in places]
    keys = [place[:4] for place in wanted]
    found: dict[tuple, Pair] = {}
    if wanted:
        for place, pair in read(min(wanted, key=lambda place: place[:4])):
            if place[:4] in keys:
                found[place[:4]] = pair
            if len(found) == len(keys):
                break
    return [found[key] for key in keys]
