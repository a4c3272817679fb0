"""Files in a run folder that show a run while it trains: every log as a line, and a picture of its present state."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_dissect.report.data import RunSummary, replace_file, to_plain

LOG_FILE, LIVE_FILE = "log.jsonl", "live.json"
LIVE_FILES = (LOG_FILE, LIVE_FILE)
TRAINING, TRAINED, STOPPED = "training", "trained", "stopped"
FORMAT_VERSION = 1


@dataclass
class LiveRun:
    """State of a run while it trains.

    Args:
        summary: What the run has observed, without its logs.
        title: Title of the run.
        state: `TRAINING`; `TRAINED` after the last step; `STOPPED` by a signal or an error.
        reason: Reason why the run stopped; empty if it did not.
        step: Number of optimiser steps so far.
        max_steps: Number of optimiser steps of the whole run.
        epoch: Epochs so far.
        earlier: Digests of the files of results that an earlier run left in the folder, by file name.
    """

    summary: RunSummary
    title: str
    state: str = TRAINING
    reason: str = ""
    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    earlier: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Replace `live.json` in a run folder."""
        content = {name: value for name, value in vars(self).items() if name != "summary"}
        content |= {"format_version": FORMAT_VERSION, "summary": self.summary.to_dict()}
        return replace_file(folder / LIVE_FILE, json.dumps(to_plain(content), allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> "LiveRun | None":
        """Read `live.json` of a run folder; None if there is none, or none that this version reads."""
        path = folder / LIVE_FILE
        try:
            content = json.loads(path.read_text("utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                return None
            summary = RunSummary.from_dict(content.pop("summary"), path)
            known = {name: content[name] for name in _TYPES if isinstance(content[name], _TYPES[name])}
            return cls(summary, **known) if known.keys() == _TYPES.keys() else None
        except Exception:  # whatever a damaged file or picture raises, the page shows what else there is
            return None


_TYPES: dict[str, Any] = {
    "title": str,
    "state": str,
    "reason": str,
    "step": int,
    "max_steps": int,
    "epoch": int | float,
    "earlier": dict,
}


def find_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the digests of those files in a folder that exist, by name."""
    return {name: digest for name in names if (digest := find_digest(folder / name)) is not None}


def find_digest(path: Path) -> str | None:
    """Return the digest of the content of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def restart_log(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replace `log.jsonl` in a run folder by the logs up to the step that a run starts or resumes at."""
    replace_file(folder / LOG_FILE, "".join(map(_format_line, entries)))


def append_log(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a log to `log.jsonl` in a run folder, as one whole line."""
    line = _format_line(entry).encode("utf-8", "replace")
    with open(folder / LOG_FILE, "ab+", buffering=0) as opened:  # one write for the whole line
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(size - 1, 0))
        # The line before may have been cut off, such as by a full disk.
        opened.write(line if opened.read(1) in (b"", b"\n") else b"\n" + line)


def _format_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(to_plain(dict(entry)), allow_nan=False) + "\n"


class LogReader:
    """Reader of a `log.jsonl` that grows, which reads each line once.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._entries: list[dict[str, Any]] = []
        self._file: int | None = None  # inode of the file that was read, which a resumed run replaces
        self._position = 0

    def read(self) -> list[dict[str, Any]] | None:
        """Return all logs so far, of whole lines that hold one; None without a file."""
        try:
            with open(self._path, "rb") as opened:
                status = os.fstat(opened.fileno())
                if status.st_ino != self._file or status.st_size < self._position:
                    self._entries, self._file, self._position = [], status.st_ino, 0
                opened.seek(self._position)
                lines, _, _ = opened.read().rpartition(b"\n")  # the last line may be half written
        except OSError:
            self._entries, self._file = [], None
            return None
        if lines:
            self._position += len(lines) + 1
            self._entries += filter(None, map(_parse_line, lines.split(b"\n")))
        return list(self._entries)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
