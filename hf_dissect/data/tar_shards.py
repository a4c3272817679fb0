"""Read WebDataset tar shards as rows, one member after the other, so that a shard may be larger than memory.

Written by hand, since the "webdataset" builder of `datasets` gives .jpg and .png pictures a column each, leaves JSON
values nested, reads web shards in blocks (see `web_file`), and refuses a shard if its first samples differ in their
members. Here, a missing picture or caption makes a bad row, which is counted and skipped.
"""

import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError

from hf_dissect.data.shard_files import find_shards, is_remote, open_shard
from hf_dissect.data.split_files import summarize_error

KEY_COLUMN = "__key__"
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXT_MEMBERS = ("txt", "caption", "text")
JSON_CAPTIONS = ("caption", "text", "captions")

_SAMPLES_LOOKED_AT = 8
_JSON_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def read_tar_shards(
    path: str, split_names: Mapping[str, str | None], streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """Read tar shards; members that share a name up to the first dot are one row.

    Args:
        path: A folder, a tar file, a glob or a brace pattern (`shard-{000..003}.tar`, `{train,test}-0.tar`), here or
            on the Hub (`hf://datasets/<user>/<name>/train-*.tar`); on a web server, a tar file or a brace pattern
            (`https://host/train-{000..123}.tar`). File and folder names tell the splits as for tables; shards that
            name none are all train.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        streaming: Whether to read while training; the shards are then divided among the workers.

    Returns:
        Rows by split, with the columns `image`, `caption` (or `captions`, if a JSON member has a list of that name),
        `__key__`, and the plain values of the JSON members. A missing image or caption is None.

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If a shard is unreadable, there is no train split, or remote shards are not streamed.
    """
    if is_remote(path) and not streaming:
        raise ValueError(
            f"data.path {path!r} is not on this machine: set data.streaming to true to read it while training, or "
            "download the shards first."
        )
    splits = {}
    for split, shards in find_shards(path, split_names).items():
        features = _infer_features(shards[0])
        given = {"shards": [_identify(shard) for shard in shards], "columns": tuple(features)}
        if streaming:
            splits[split] = IterableDataset.from_generator(_generate_rows, features=features, gen_kwargs=given)
            continue
        try:
            splits[split] = Dataset.from_generator(_generate_rows, features=features, gen_kwargs=given)
        except DatasetGenerationError as error:
            raise ValueError(f"data.path {path!r}: {summarize_error(error.__cause__ or error)}") from error
    return splits


def _identify(shard: str) -> tuple[str, int, int]:
    """Return name, size and time, so that the cache of a map-style data set notices a shard that changed."""
    if is_remote(shard):
        return shard, 0, 0
    status = os.stat(shard)
    return shard, status.st_size, status.st_mtime_ns


def _infer_features(shard: str) -> Features:
    """Return the columns that the first samples of a shard have."""
    samples = list(itertools.islice(_read_samples(shard), _SAMPLES_LOOKED_AT))
    if not samples:
        raise ValueError(f"{shard!r} holds no samples. A shard holds members such as 000.jpg and 000.txt.")
    if not any(name in IMAGE_MEMBERS for _, members in samples for name in members):
        found = sorted({name for _, members in samples for name in members})
        raise ValueError(f"{shard!r} holds no image member ({', '.join(IMAGE_MEMBERS)}), only {', '.join(found)}.")
    records = [_parse_json(members) for _, members in samples]
    has_list = any(isinstance(record.get("captions"), list) for record in records)
    text = {"captions": List(Value("string"))} if has_list else {"caption": Value("string")}
    features = {"image": Image(decode=False), **text, KEY_COLUMN: Value("string")}
    for record in records:
        for name, value in record.items():
            if name not in features and name not in JSON_CAPTIONS and type(value) in _JSON_TYPES:
                features[name] = Value(_JSON_TYPES[type(value)])
    return Features(features)


def _generate_rows(shards: list[tuple[str, int, int]], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards, given as `_identify` returns them."""
    several = "captions" in columns
    for shard, _, _ in shards:
        for key, members in _read_samples(shard):
            record = _parse_json(members)
            row = {name: record.get(name) for name in columns}
            image = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
            row["image"] = None if image is None else {"bytes": image, "path": None}
            captions = _read_captions(members, record)
            row.update({"captions": captions} if several else {"caption": captions[0] if captions else None})
            yield {**row, KEY_COLUMN: key}


def _read_captions(members: dict[str, bytes], record: dict[str, Any]) -> list[str]:
    """Return the captions of a sample, from the text member or else from the JSON; empty if it has none."""
    for name in TEXT_MEMBERS:
        if name in members:
            return [members[name].decode("utf-8", errors="replace").strip()]
    value: Any = next((record[name] for name in reversed(JSON_CAPTIONS) if record.get(name)), [])
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _parse_json(members: dict[str, bytes]) -> dict[str, Any]:
    """Return the JSON member of a sample, empty if there is none or it is broken."""
    try:
        record = json.loads(members.get("json", b"{}"))
    except ValueError:
        return {}  # a row without a caption, which is counted like any other bad row
    return record if isinstance(record, dict) else {}


def _read_samples(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members (by extension, in lower case) of each sample of a shard.

    Raises:
        ValueError: If the shard is unreadable; the message names it.
    """
    try:
        with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            current: str | None = None
            members: dict[str, bytes] = {}
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if current is not None and key != current and members:
                    yield current, members
                    members = {}
                current = key
                content = archive.extractfile(member)
                members[extension.lower()] = content.read() if content else b""
            if current is not None and members:
                yield current, members
    except Exception as error:  # clients of remote file systems raise errors of many kinds
        way_out = "Check its address and the connection" if is_remote(shard) else "It may be cut off: copy it again"
        raise ValueError(
            f"{shard!r} is not a readable tar file ({summarize_error(error)}). {way_out}, or leave it out."
        ) from error
