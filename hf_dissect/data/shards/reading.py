"""Read WebDataset tar shards as rows, one member after the other, so that a shard may be larger than memory.

Written by hand, since the "webdataset" builder of `datasets` gives .jpg and .png pictures a column each, leaves JSON
values nested, reads web shards in blocks (see `web_file`), and refuses a shard if its first samples differ in their
members. Here, a missing picture or caption makes a bad row, which is counted and skipped. A table looks through all
shards for its columns first, once, as `datasets` caches what was found; a stream looks at its beginning.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError

from hf_dissect.data.pair_columns import CLEAN_COLUMNS
from hf_dissect.data.shards.archive import BadShard, Member, read_members
from hf_dissect.data.shards.columns import Halves, Layout, make_row
from hf_dissect.data.shards.files import find_shards, is_remote, open_shard
from hf_dissect.data.shards.layout import check_complete, choose_layout, warn_of_choices
from hf_dissect.data.shards.samples import group_samples
from hf_dissect.data.shards.skipped import describe_in, note_skipped
from hf_dissect.data.shards.survey import Asked, NamedSurveys, look_ahead, survey_shard
from hf_dissect.data.split_files import summarize_error

_VERSION = 2
"""Version of these readers, on which the cache depends: rows that another one read are read again."""

Identity = tuple[str, int, int]

logger = logging.getLogger(__name__)


def read_tar_shards(
    path: str,
    split_names: Mapping[str, str | None],
    streaming: bool = False,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    task_column: str | None = None,
    clean_column: str | None = None,
    weight_column: str | None = None,
    balance_column: str | None = None,
    skip_bad_shards: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """Read tar shards; members that share a name up to the first dot are one row.

    Args:
        path: A folder, a tar file, a glob or a brace pattern (`shard-{000..003}.tar`, `{train,test}-0.tar`), here or
            on the Hub (`hf://datasets/<user>/<name>/train-*.tar`); on a web server, a tar file or a brace pattern
            (`https://host/train-{000..123}.tar`). File and folder names tell the splits as for tables; shards that
            name none are all train. They may be compressed by gzip, bzip2, xz or zstd.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        streaming: Whether to read while training; the shards are then divided among the workers.
        image_column: Member (`png`) or JSON field with the picture; None takes the first image member.
        caption_column: Member (`txt`) or JSON field with the caption or captions; None takes the first of `.txt`,
            `.caption`, `.text` and the JSON fields `captions`, `text`, `caption` that is not empty.
        id_column: JSON field, member or `__key__` with the id; None for none.
        task_column: JSON field or member with the task; None for none.
        clean_column: JSON field or member with the truth; None recognises the usual names.
        weight_column: JSON field or member with the weight, in the train split; None for none. A sample of a stream
            without a number there makes a bad row.
        balance_column: JSON field or member with the cluster, in the train split; None for none. Samples may lack it.
        skip_bad_shards: Whether to skip the rest of a damaged shard, which is warned of and recorded (see `skipped`).

    Returns:
        Rows by split, with the columns `image` and `caption` (or `captions`, if a JSON member has a list) or those
        that were asked for, and `__key__`. A table also has the plain values of the JSON members; a stream has those
        that were asked for, and the whole JSON member as text in `__json__`. A missing image or caption is None.

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If a shard is unreadable, samples have no pictures or what was asked for, there is no train split,
            or remote shards are not streamed.
    """
    if is_remote(path) and not streaming:
        raise ValueError(
            f"data.path {path!r} is not on this machine: set data.streaming to true to read it while training, or "
            "download the shards first."
        )
    usual = tuple(name for name in (id_column, task_column, clean_column) if name and name != "__key__")
    splits: dict[str, Dataset | IterableDataset] = {}
    for split, shards in find_shards(path, split_names).items():
        of_training = (weight_column, balance_column) if split == "train" else ()
        named = tuple(dict.fromkeys((*usual, *filter(None, of_training))))
        # The usual names of the truth are looked for as well, but not every sample needs them.
        truths = CLEAN_COLUMNS if clean_column is None else (clean_column,)
        asked = Asked(image_column, caption_column, tuple(dict.fromkeys((*named, *truths))), truths)
        make = _make_stream if streaming else _make_table
        optional = of_training if streaming else of_training[1:]  # a table without a weight is refused
        splits[split] = make(path, shards, asked, named, skip_bad_shards, frozenset(filter(None, optional)) - {*usual})
    return splits


def _make_stream(
    path: str,
    shards: list[str],
    asked: Asked,
    named: tuple[str, ...],
    skip_bad_shards: bool,
    may_lack: frozenset[str],
) -> IterableDataset:
    surveys, damaged = look_ahead(shards, lambda shard: _open_members(shard, asked.is_wanted), asked, named)
    if damaged and not skip_bad_shards:
        shard, reason = next(iter(damaged.items()))
        raise ValueError(describe_bad_shard(shard, reason))
    layout = choose_layout(path, surveys, asked, named, damaged, streaming=True)
    layout = replace(layout, required=tuple(name for name in layout.required if name not in may_lack))
    warn_of_choices(path, surveys, asked, layout)
    given = {"shards": [_identify(shard) for shard in shards], "layout": layout, "skip_bad_shards": skip_bad_shards}
    return IterableDataset.from_generator(_stream_rows, features=layout.features, gen_kwargs=given)


def _make_table(
    path: str,
    shards: list[str],
    asked: Asked,
    named: tuple[str, ...],
    skip_bad_shards: bool,
    may_lack: frozenset[str],
) -> Dataset:
    unreadable = _find_unreadable(shards)
    readable = [_identify(shard) for shard in shards if shard not in unreadable]
    surveys, damaged = _survey_table(path, readable, asked) if readable else (NamedSurveys(), {})
    skipped = unreadable | damaged
    for shard, reason in skipped.items():
        if not skip_bad_shards:
            raise ValueError(describe_bad_shard(shard, reason))
        note_skipped(shard, reason)
    layout = choose_layout(path, surveys, asked, named, skipped, streaming=False)
    check_complete(surveys, [name for name in named if name not in may_lack])
    warn_of_choices(path, surveys, asked, layout)
    parts = [(*identity, identity[0] in damaged) for identity in readable]
    given = {"shards": parts, "layout": layout, "version": _VERSION}
    return describe_in(_generate(path, _table_rows, layout.features, given), skipped)


def _survey_table(path: str, shards: list[Identity], asked: Asked) -> tuple[NamedSurveys, dict[str, str]]:
    """Return the survey of all shards, from the cache of `datasets` if they are unchanged, and the damaged ones."""
    given = {"shards": shards, "asked": asked, "version": _VERSION}
    total, damaged = NamedSurveys(), {}
    for (shard, _, _), text in zip(
        shards, _generate(path, _survey_rows, Features({"facts": Value("string")}), given)["facts"], strict=True
    ):
        facts = json.loads(text)
        total.merge(NamedSurveys.from_json(facts["surveys"]))
        if facts["problem"] is not None:
            damaged[shard] = facts["problem"]
    return total, damaged


def _generate(path: str, generator: Callable[..., Any], features: Features, given: dict[str, Any]) -> Dataset:
    try:
        return Dataset.from_generator(generator, features=features, gen_kwargs=given)
    except DatasetGenerationError as error:
        raise ValueError(f"data.path {path!r}: {summarize_error(error.__cause__ or error)}") from error


def _find_unreadable(shards: Sequence[str]) -> dict[str, str]:
    """Return the shards that cannot be opened: what was read of a shard is cached, but not that it could not be."""
    unreadable = {}
    for shard in shards:
        try:
            with open(shard, "rb") as file:
                file.read(1)
        except OSError as error:
            unreadable[shard] = error.strerror or summarize_error(error)
    return unreadable


def _identify(shard: str) -> Identity:
    """Return name, size and time, so that the cache of a map-style data set notices a shard that changed."""
    if is_remote(shard):
        return shard, 0, 0
    status = os.stat(shard)
    return shard, status.st_size, status.st_mtime_ns


def _survey_rows(shards: list[Identity], asked: Asked, version: int) -> Iterator[dict[str, str]]:
    for shard, _, _ in shards:
        with open_shard(shard) as file:
            surveys, problem = survey_shard(shard, read_members(file, asked.is_wanted), asked)
        yield {"facts": json.dumps({"surveys": surveys.to_json(), "problem": problem})}


def _table_rows(shards: list[tuple[str, int, int, bool]], layout: Layout, version: int) -> Iterator[dict[str, Any]]:
    for shard, _, _, is_damaged in shards:
        try:
            yield from _make_rows(shard, layout)
        except BadShard as error:
            if not is_damaged:
                raise ValueError(describe_bad_shard(shard, str(error))) from error


def _stream_rows(shards: list[Identity], layout: Layout, skip_bad_shards: bool) -> Iterator[dict[str, Any]]:
    for shard, _, _ in shards:
        try:
            yield from _make_rows(shard, layout)
        except BadShard as error:
            if not skip_bad_shards:
                raise ValueError(describe_bad_shard(shard, str(error))) from error
            note_skipped(shard, str(error))


def _make_rows(shard: str, layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard.

    Raises:
        BadShard: If it cannot be read to its end.
        ValueError: If a row cannot be made (see `make_row`), or a sample lies in two places.
    """
    halves = Halves(shard, layout)
    for key, members in group_samples(_open_members(shard, layout.is_wanted), layout.at_last_dot):
        row = make_row(shard, key, members, layout)
        halves.check(key, row)
        yield row


def _open_members(shard: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yield the members of a shard.

    Raises:
        BadShard: If it cannot be opened or read to its end.
    """
    try:
        with open_shard(shard) as file:
            yield from read_members(file, wanted)
    except BadShard:
        raise
    except Exception as error:  # clients of remote file systems raise errors of many kinds
        raise BadShard(summarize_error(error)) from error


def describe_bad_shard(shard: str, reason: str) -> str:
    """Return the error message for a shard that cannot be read to its end."""
    way_out = "Check its address and the connection" if is_remote(shard) else "It may be cut off: copy it again"
    return (
        f"{shard!r} is not a readable tar file ({reason}). {way_out}, leave it out, or set data.skip_bad_shards to "
        "true to use its pairs before this place."
    )
