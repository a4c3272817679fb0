"""WebDataset tar shards as rows, read one member after the other, so that shards larger than memory can be used."""

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError

from hf_dissect.data.split_files import existing_path, first_line, group_by_split, listing

KEY_COLUMN = "__key__"
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXT_MEMBERS = ("txt", "caption", "text")
JSON_CAPTIONS = ("caption", "text", "captions")

_SAMPLES_LOOKED_AT = 8
_JSON_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def tar_shard_splits(
    path: str, split_names: Mapping[str, str | None], streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """Reads tar shards; members that share a name up to the first dot are one row.

    Args:
        path: A folder, a tar file, a glob or a brace pattern (`shard-{000..003}.tar`, `{train,test}-0.tar`). Splits
            are told from file and folder names as for tables; shards that name none are all train.
        split_names: Name of "train", "validation" and "test" at the source.
        streaming: Read while training; shards are then shared out among the workers.

    Returns:
        Columns `image`, `caption` (or `captions`, if a JSON member has a list of that name), `__key__`, and the plain
        values of the JSON members. An image or caption that is missing is None.

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If a shard is unreadable or there is no train split.
    """
    shards, root = _find_shards(path)
    splits = {}
    found = {"train": shards} if shards == [root] else group_by_split(shards, root, split_names)
    for split, files in found.items():
        features = _features_of(files[0])
        # Size and time are told so that the cache of a map-style data set notices a shard that changed.
        known = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        given = {"shards": known, "columns": tuple(features)}
        if streaming:
            splits[split] = IterableDataset.from_generator(_rows, features=features, gen_kwargs=given)
            continue
        try:
            splits[split] = Dataset.from_generator(_rows, features=features, gen_kwargs=given)
        except DatasetGenerationError as error:
            raise ValueError(f"data.path {path!r}: {first_line(error.__cause__ or error)}") from error
    return splits


def expand_braces(pattern: str) -> list[str]:
    """Names meant by a brace pattern: `{000..003}` counts, zeros kept, `{a,b}` enumerates."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if counted:
        first, last = counted.groups()
        width = len(first) if first.startswith("0") else 0
        inner = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        inner = braces[1].split(",")
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for part in inner for name in expand_braces(head + part + tail)]


def _find_shards(path: str) -> tuple[list[Path], Path]:
    if not any(mark in path for mark in "*?[{"):
        root = existing_path(path)
        shards = [root] if root.is_file() else [f for pattern in ("*.tar", "*/*.tar") for f in root.glob(pattern)]
        if not shards:
            raise FileNotFoundError(
                f"data.path {path!r} holds no .tar file; found {listing(root)}. Name the folder of the shards, or a "
                "pattern such as shards/train-{000..003}.tar."
            )
        return shards, root
    shards = []
    for pattern in expand_braces(str(Path(path).expanduser())):
        matches = [Path(name) for name in glob.glob(pattern)]
        if not matches:
            raise FileNotFoundError(f"data.path {path!r}: no file {pattern!r}. Correct the pattern or add the shard.")
        shards += matches
    # Splits are told by the names in the pattern's own part only, not by the folders that lead to it.
    root = Path(re.split(r"[*?\[{]", str(Path(path).expanduser()))[0] + "x").parent
    return shards, root


def _features_of(shard: Path) -> Features:
    """Columns as the first samples of a shard show them."""
    samples = list(itertools.islice(_samples(str(shard)), _SAMPLES_LOOKED_AT))
    if not samples:
        raise ValueError(f"{str(shard)!r} holds no samples. A shard holds members such as 000.jpg and 000.txt.")
    if not any(name in IMAGE_MEMBERS for _, members in samples for name in members):
        found = sorted({name for _, members in samples for name in members})
        raise ValueError(
            f"{str(shard)!r} holds no image member ({', '.join(IMAGE_MEMBERS)}), only {', '.join(found)}."
        )
    records = [_json_of(members) for _, members in samples]
    has_list = any(isinstance(record.get("captions"), list) for record in records)
    text = {"captions": List(Value("string"))} if has_list else {"caption": Value("string")}
    features = {"image": Image(decode=False), **text, KEY_COLUMN: Value("string")}
    for record in records:
        for name, value in record.items():
            if name not in features and name not in JSON_CAPTIONS and type(value) in _JSON_TYPES:
                features[name] = Value(_JSON_TYPES[type(value)])
    return Features(features)


def _rows(shards: list[tuple[str, int, int]], columns: tuple[str, ...]) -> Iterator[dict]:
    several = "captions" in columns
    for shard, _, _ in shards:
        for key, members in _samples(shard):
            record = _json_of(members)
            row = {name: record.get(name) for name in columns}
            image = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
            row["image"] = None if image is None else {"bytes": image, "path": None}
            captions = _captions_of(members, record)
            row.update({"captions": captions} if several else {"caption": captions[0] if captions else None})
            yield {**row, KEY_COLUMN: key}


def _captions_of(members: dict[str, bytes], record: dict) -> list[str]:
    """Captions of a sample, the text member before the JSON; empty if it has none."""
    for name in TEXT_MEMBERS:
        if name in members:
            return [members[name].decode("utf-8", errors="replace").strip()]
    value = next((record[name] for name in reversed(JSON_CAPTIONS) if record.get(name)), [])
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _json_of(members: dict[str, bytes]) -> dict:
    try:
        record = json.loads(members.get("json", b"{}"))
    except ValueError:
        return {}  # a row without a caption, which is counted like any other bad row
    return record if isinstance(record, dict) else {}


def _samples(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (by extension, in lower case) of each sample of a shard, in order."""
    try:
        with tarfile.open(shard, "r|*") as archive:
            current, members = None, {}
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                members[extension.lower()] = archive.extractfile(member).read()
            if members:
                yield current, members
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{shard!r} is not a readable tar file ({first_line(error)}). It may be cut off: copy it again or "
            "leave it out."
        ) from error
