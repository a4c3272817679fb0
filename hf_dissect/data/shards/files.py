"""Find the tar shards that a path names, on this machine, on the Hub or on a web server, and open them.

fsspec lists and reads shards elsewhere, except for those of a web server (see `web_file`). Brace patterns, which
WebDataset shards are usually named by, are unknown to fsspec and expanded here.
"""

import glob
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, cast

import fsspec

from hf_dissect.data.shards.web_file import WebFile
from hf_dissect.data.split_files import group_by_split, join_names, list_folder, require_path, summarize_error

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Ends of the names of shards; compression is recognised by the content."""

_GLOB_MARKS = "*?["
_WEB = ("http://", "https://")


logger = logging.getLogger(__name__)


def is_shard_name(path: str) -> bool:
    """Return whether a path or pattern names tar shards, plain or compressed."""
    return path.lower().endswith(ENDINGS)


def find_shards(path: str, split_names: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the names of the shards of each split, by file and folder names; all are train if none names one.

    Args:
        path: See `read_tar_shards`.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If there is no train split, or a server cannot list its shards.
    """
    shards, root = _find_remote_shards(path) if is_remote(path) else _find_local_shards(path)
    if list(shards) == [root]:
        return {"train": [shards[root]]}
    found = group_by_split(shards, root, split_names)
    return {split: [shards[file] for file in files] for split, files in found.items()}


def is_remote(path: str) -> bool:
    """Return whether a path is an address, such as hf://... or https://..., rather than a file of this machine."""
    return "://" in path


def open_shard(shard: str) -> BinaryIO:
    """Open a shard for reading once from its beginning to its end.

    Raises:
        Exception: Any error that the shard's file system raises.
    """
    if shard.startswith(_WEB):
        return cast(BinaryIO, io.BufferedReader(WebFile(shard), buffer_size=1 << 20))
    if shard.startswith("hf://"):
        # Without blocks it is one stream, which the Hub's client resumes where it broke.
        return fsspec.open(shard, "rb", block_size=0).open()
    return fsspec.open(shard, "rb").open() if is_remote(shard) else open(shard, "rb")


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a brace pattern means: `{000..003}` counts and keeps zeros, `{a,b}` enumerates."""
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


def _find_local_shards(path: str) -> tuple[dict[PurePath, str], PurePath]:
    """Return absolute names by path, and the folder above which names do not count."""
    if not _is_pattern(path):
        root = require_path(path)
        shards = [root] if root.is_file() else _list_shards(root)
        if not shards:
            raise FileNotFoundError(
                f"data.path {path!r} holds no .tar file, plain or compressed ({', '.join(ENDINGS)}); found "
                f"{list_folder(root)}. Name the folder of the shards, or a pattern such as "
                "shards/train-{000..003}.tar."
            )
        return {shard: str(shard.absolute()) for shard in shards}, root
    shards = []
    for pattern in expand_braces(str(Path(path).expanduser())):
        matches = [Path(name) for name in glob.glob(pattern)]
        if not matches:
            raise FileNotFoundError(f"data.path {path!r}: no file {pattern!r}. Correct the pattern or add the shard.")
        shards += matches
    return {shard: str(shard.absolute()) for shard in shards}, _cut_pattern(str(Path(path).expanduser()), Path)


def _list_shards(root: Path) -> list[Path]:
    """Return the shards in a folder and its subfolders; of a shard that is there twice, the shorter name."""
    inside = [file for pattern in ("*", "*/*") for file in root.glob(pattern)]
    shards = [file for file in inside if is_shard_name(file.name) and not file.name.startswith(".") and file.is_file()]
    by_stem: dict[Path, list[Path]] = {}
    for shard in sorted(shards, key=lambda shard: (len(shard.name), shard)):
        ending = max((ending for ending in ENDINGS if shard.name.lower().endswith(ending)), key=len)
        by_stem.setdefault(shard.with_name(shard.name[: -len(ending)]), []).append(shard)
    copies = [copy for first, *others in by_stem.values() for copy in others]
    if copies:
        logger.warning("Left out, as the same shard is there in another form: %s", join_names(sorted(copies)))
    return [first for first, *_ in by_stem.values()]


def _find_remote_shards(path: str) -> tuple[dict[PurePath, str], PurePath]:
    """Return addresses by path, and the folder above which names do not count."""
    shards = []
    for pattern in expand_braces(path):
        matches = _match_addresses(path, pattern)
        if not matches:
            raise FileNotFoundError(
                f"data.path {path!r}: no shard {pattern!r}. Correct the name of the data set or the pattern."
            )
        shards += matches
    names: dict[PurePath, str] = {PurePosixPath(shard.partition("://")[2]): shard for shard in shards}
    address = path.partition("://")[2]
    if _is_pattern(path):
        return names, _cut_pattern(address, PurePosixPath)
    return names, PurePosixPath(address)


def _match_addresses(path: str, pattern: str) -> list[str]:
    """Return the shards that fit a pattern; its server is only asked if the pattern leaves something open."""
    web = pattern.startswith(_WEB)
    if (".tar" in pattern or is_shard_name(pattern)) and not any(
        mark in pattern for mark in ("*" if web else _GLOB_MARKS)
    ):
        return [pattern]
    if web:
        raise ValueError(
            f"data.path {path!r}: a web server does not tell which files it has; name the shards with braces, such as "
            "https://host/train-{000..123}.tar."
        )
    is_open = any(mark in pattern for mark in _GLOB_MARKS)
    patterns = [pattern] if is_open else [f"{pattern}/*", f"{pattern}/*/*"]
    try:
        files = fsspec.core.url_to_fs(pattern)[0]
        return [
            files.unstrip_protocol(name)
            for each in patterns
            for name in sorted(files.glob(each))
            if is_open or is_shard_name(name)
        ]
    except FileNotFoundError:
        return []
    except Exception as error:  # clients and connections raise errors of many kinds, with the same way out
        raise ValueError(
            f"data.path {path!r}: its server does not tell which shards there are ({type(error).__name__}: "
            f"{summarize_error(error)}). Check the name, the connection and, for a private data set, the login."
        ) from error


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in _GLOB_MARKS + "{")


def _cut_pattern(pattern: str, kind: type[PurePath]) -> PurePath:
    # Only names in the pattern's own part name splits, not the folders that lead to it.
    return kind(re.split(r"[*?\[{]", pattern)[0] + "x").parent
