"""Which tar shards a path means, on this machine, on the Hub or on a web server, and how one is opened."""

import glob
import http.client
import io
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

import fsspec

from hf_dissect.data.split_files import existing_path, first_line, group_by_split, listing

_GLOB_MARKS = "*?["
_SECONDS_TO_ANSWER = 60
_PAUSES = (0, 1, 5, 20)  # seconds before a broken connection is tried again
_BROKEN = (OSError, EOFError, http.client.HTTPException)


def shards_by_split(path: str, split_names: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Names of the shards of each split; splits are told from file and folder names, all are train if none is named.

    Args:
        path: see `tar_shard_splits`.
        split_names: name of "train", "validation" and "test" at the source.

    Raises:
        FileNotFoundError: there is no shard.
        ValueError: there is no train split, or a server cannot be asked.
    """
    shards, root = _remote_shards(path) if is_remote(path) else _local_shards(path)
    if list(shards) == [root]:
        return {"train": [shards[root]]}
    found = group_by_split(shards, root, split_names)
    return {split: [shards[file] for file in files] for split, files in found.items()}


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as hf://... or https://..., rather than a file of this machine."""
    return "://" in path


def open_shard(shard: str) -> BinaryIO:
    """A shard for reading from its beginning to its end; whatever its file system raises if it cannot be had."""
    if shard.startswith(("http://", "https://")):
        return io.BufferedReader(_WebFile(shard), buffer_size=1 << 20)
    if shard.startswith("hf://"):
        # Without blocks it is one stream, which the client takes up again where it broke.
        return fsspec.open(shard, "rb", block_size=0).open()
    return fsspec.open(shard, "rb").open() if is_remote(shard) else open(shard, "rb")


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


def _local_shards(path: str) -> tuple[dict[PurePath, str], PurePath]:
    if not _is_pattern(path):
        root = existing_path(path)
        shards = [root] if root.is_file() else [f for pattern in ("*.tar", "*/*.tar") for f in root.glob(pattern)]
        if not shards:
            raise FileNotFoundError(
                f"data.path {path!r} holds no .tar file; found {listing(root)}. Name the folder of the shards, or a "
                "pattern such as shards/train-{000..003}.tar."
            )
        return {shard: str(shard.absolute()) for shard in shards}, root
    shards = []
    for pattern in expand_braces(str(Path(path).expanduser())):
        matches = [Path(name) for name in glob.glob(pattern)]
        if not matches:
            raise FileNotFoundError(f"data.path {path!r}: no file {pattern!r}. Correct the pattern or add the shard.")
        shards += matches
    return {shard: str(shard.absolute()) for shard in shards}, _root(str(Path(path).expanduser()), Path)


def _remote_shards(path: str) -> tuple[dict[PurePath, str], PurePath]:
    shards = []
    for pattern in expand_braces(path):
        matches = _matches(path, pattern)
        if not matches:
            raise FileNotFoundError(
                f"data.path {path!r}: no shard {pattern!r}. Correct the name of the data set or the pattern."
            )
        shards += matches
    names = {PurePosixPath(shard.partition("://")[2]): shard for shard in shards}
    address = path.partition("://")[2]
    if _is_pattern(path):
        return names, _root(address, PurePosixPath)
    return names, PurePosixPath(address)


def _matches(path: str, pattern: str) -> list[str]:
    """Shards on a server; the server is asked only if the pattern does not say it all."""
    web = pattern.startswith(("http://", "https://"))
    if ".tar" in pattern and not any(mark in pattern for mark in ("*" if web else _GLOB_MARKS)):
        return [pattern]
    if web:
        raise ValueError(
            f"data.path {path!r}: a web server does not tell which files it has; name the shards with braces, such as "
            "https://host/train-{000..123}.tar."
        )
    patterns = (
        [pattern] if any(mark in pattern for mark in _GLOB_MARKS) else [f"{pattern}/*.tar", f"{pattern}/*/*.tar"]
    )
    try:
        files = fsspec.core.url_to_fs(pattern)[0]
        return [files.unstrip_protocol(name) for each in patterns for name in sorted(files.glob(each))]
    except FileNotFoundError:
        return []
    except Exception as error:  # whatever a client or its connection may raise, the way out is the same
        raise ValueError(
            f"data.path {path!r}: its server does not tell which shards there are ({type(error).__name__}: "
            f"{first_line(error)}). Check the name, the connection and, for a private data set, the login."
        ) from error


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in _GLOB_MARKS + "{")


def _root(pattern: str, kind: type[PurePath]) -> PurePath:
    # Splits are told by the names in the pattern's own part only, not by the folders that lead to it.
    return kind(re.split(r"[*?\[{]", pattern)[0] + "x").parent


class _WebFile(io.RawIOBase):
    """A file of a web server as one stream; where the connection breaks it is taken up again.

    A shard is read for as long as a model trains on it, much longer than servers keep idle connections.
    """

    def __init__(self, url: str):
        self._url = url
        self._place = 0
        self._size: int | None = None
        self._response = self._connect()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        for pause in _PAUSES:
            try:
                count = self._response.readinto(buffer)
                if count or self._size is None or self._place >= self._size:
                    self._place += count
                    return count
                broken = EOFError(f"it ends after {self._place} of {self._size} bytes")
            except _BROKEN as error:
                broken = error
            self._response.close()
            time.sleep(pause)
            try:
                self._response = self._connect()
            except _BROKEN as error:
                broken = error
        raise broken

    def close(self) -> None:
        if not self.closed:
            self._response.close()
        super().close()

    def _connect(self) -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={self._place}-"} if self._place else {}
        response = urllib.request.urlopen(
            urllib.request.Request(self._url, headers=headers), timeout=_SECONDS_TO_ANSWER
        )
        skipped = 0 if response.status == 206 else self._place
        length = response.headers.get("Content-Length")
        self._size = None if length is None else int(length) + self._place - skipped
        while skipped:
            read = len(response.read(min(skipped, 1 << 20)))
            if not read:
                raise EOFError(f"it ends before byte {self._place}")
            skipped -= read
        return response
