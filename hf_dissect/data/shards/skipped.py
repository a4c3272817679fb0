"""Record of shards that were not read to their end, from the reader in a worker to the figures of a run."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import datasets

Row = TypeVar("Row")

_LINE = "Shard not read to its end: "
_END = object()
_record: ContextVar[dict[str, str] | None] = ContextVar("skipped_shards", default=None)

logger = logging.getLogger(__name__)


def note_skipped(shard: str, reason: str) -> None:
    """Warn of a shard that is not read to its end, and add it to the record of whoever reads, see `record_skipped`."""
    record = _record.get()
    if record is None or shard not in record:
        logger.warning("%r is not read to its end (%s), as data.skip_bad_shards is true.", shard, reason)
    if record is not None:
        record[shard] = reason


def record_skipped(rows: Iterator[Row], record: dict[str, str]) -> Iterator[Row]:
    """Yield rows, and enter into `record` the shards that their reader skips, with the reason."""
    while True:
        token = _record.set(record)
        try:
            row: Any = next(rows, _END)
        finally:
            _record.reset(token)
        if row is _END:
            return
        yield row


def describe_in(rows: datasets.Dataset, skipped: Mapping[str, str]) -> datasets.Dataset:
    """Write skipped shards into the description of a table, which all tables that are made of it share."""
    if skipped:
        rows.info.description = "\n".join(_LINE + json.dumps(item) for item in skipped.items())
    return rows


def read_description(rows: datasets.Dataset) -> dict[str, str]:
    """Return the skipped shards that `describe_in` wrote into a table or one that it was made of."""
    skipped = {}
    for line in (rows.info.description or "").splitlines():
        if line.startswith(_LINE):
            with contextlib.suppress(ValueError):
                shard, reason = json.loads(line.removeprefix(_LINE))
                skipped[shard] = reason
    return skipped


def find_skipped(data: Any) -> dict[str, str]:
    """Return the skipped shards of pairs, of a table, or of a dict of several, with the reason."""
    if isinstance(data, Mapping):
        return {shard: reason for part in data.values() for shard, reason in find_skipped(part).items()}
    return read_description(data) if isinstance(data, datasets.Dataset) else getattr(data, "skipped_shards", {})


def describe_all_skipped(skipped: Mapping[str, str]) -> str:
    """Return why there are no rows, to be added to an error message; empty if no shard was skipped."""
    if not skipped:
        return ""
    shard, reason = next(iter(skipped.items()))
    return f" {len(skipped)} shards were skipped, as data.skip_bad_shards is true, such as {shard!r} ({reason})."


def summarize_skipped(skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return `count` and the reasons by `shards`, named without the folders they lie in, for `metrics.json`."""
    names = [shard.rsplit("/", 1)[-1] for shard in skipped]
    if len(set(names)) < len(names):
        names = ["/".join(shard.rsplit("/", 2)[-2:]) for shard in skipped]
    return {"count": len(skipped), "shards": dict(sorted(zip(names, skipped.values(), strict=True)))}


def summarize_all_skipped(skipped: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return `count` and `shards` of the split "train", and the same of each other split under its name.

    Args:
        skipped: Skipped shards and the reasons by split.

    Returns:
        Entry `skipped_shards` of `metrics.json`; empty if no shard was skipped.
    """
    others = {split: summarize_skipped(shards) for split, shards in skipped.items() if shards and split != "train"}
    train = skipped.get("train", {})
    return {**summarize_skipped(train), **others} if train or others else {}
