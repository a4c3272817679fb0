"""The audit that a run folder may hold, as a few of its most suspicious pairs."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from hf_dissect.report.data import ROWS_A_FOLDER, thumbnail

SCORES_FILE = "scores.parquet"
PLACES = (".", "audit")
"""Folders, in a run folder, in which an audit is found."""
MAX_PAIRS = 12
MAX_CAPTION = 400
_FIGURES = {"p_mismatched": "p(mismatched)", "score": "score", "correlation": "correlation"}


class AuditFolder:
    """Reader of the audit in a run folder, if there is one.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: tuple[str, dict[str, Any] | None] = ("", None)

    def find_version(self) -> str:
        """Return a word that changes with the table of the audit; empty without one."""
        if (path := self._find()) is None:
            return ""
        try:
            status = os.stat(path)
        except OSError:
            return ""
        return f"{status.st_ino:x}.{status.st_mtime_ns:x}"

    def read(self) -> dict[str, Any] | None:
        """Return a sentence, the name of the page and the first pairs; None without a table that can be read."""
        version = self.find_version()
        if version != self._read[0]:
            self._read = version, self._summarise()
        return self._read[1]

    def _find(self) -> Path | None:
        paths = (self._folder / place / SCORES_FILE for place in PLACES)
        return next((path for path in paths if path.is_file()), None)

    def _summarise(self) -> dict[str, Any] | None:
        if (path := self._find()) is None:
            return None
        try:
            with pq.ParquetFile(path) as table:
                names = table.schema_arrow.names
                share = _average(table, "p_mismatched") if "p_mismatched" in names else None
                wanted = [name for name in ("sample_id", "row", "caption", *_FIGURES) if name in names]
                first = next(table.iter_batches(MAX_PAIRS, columns=wanted), None)
                rows = [] if first is None else first.to_pylist()
                count = table.metadata.num_rows
        except Exception:  # whatever a damaged or half-written table raises
            return None
        known = "" if share is None else f", of which about {share:.1%} are mismatched, by the audit"
        return {
            "sentence": f"{count:,} pairs were audited{known}.",
            "page": (path.parent / "audit.html").relative_to(self._folder).as_posix(),
            "cards": [_describe(row, path.parent / "thumbnails") for row in rows],
        }


def _average(table: pq.ParquetFile, name: str) -> float | None:
    values = table.read(columns=[name])[name].to_numpy(zero_copy_only=False).astype(np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _describe(row: dict[str, Any], thumbnails: Path) -> dict[str, Any]:
    caption = str(row.get("caption") or "")
    figures = [(label, row.get(name)) for name, label in _FIGURES.items()]
    return {
        "sample_id": row.get("sample_id"),
        "caption": caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION] + "…",
        "figures": [(label, f"{value:.3g}") for label, value in figures if isinstance(value, int | float)],
        "picture": _read_picture(thumbnails, row.get("row")),
    }


def _read_picture(folder: Path, row: Any) -> str | None:
    """Return a thumbnail as base64 JPEG, made from the decoded picture and never from the bytes of a file."""
    if not isinstance(row, int) or row < 0:
        return None
    try:
        with Image.open(folder / str(row // ROWS_A_FOLDER) / f"{row}.jpg") as picture:
            picture.load()
            return thumbnail(picture.copy())
    except Exception:  # a missing, damaged or huge picture
        return None
