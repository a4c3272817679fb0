"""The data of a report, kept as one JSON file so that the report can be drawn again without the model."""

import base64
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image

from hf_dissect.version import __version__

THUMBNAIL_SIZE = 160
"""Longest side of a stored picture, in pixels."""
MAX_SAMPLES = 12
ROWS_A_FOLDER = 1000
"""Thumbnails of an audit in one folder."""
FORMAT_VERSION = 1


@dataclass
class PairSample:
    """One image-text pair for the sample sheet.

    Args:
        sample_id: id of the pair.
        caption: text of the pair.
        correlation: score max(100 * cosine, 0) at the last visit.
        differential: historical minus current score (DISSect, arXiv 2507.12998); None without a history.
        is_clean: True if the caption belongs to the image; None if the truth is unknown.
        image: picture to show; None if there is none.
    """

    sample_id: int
    caption: str
    correlation: float
    differential: float | None = None
    is_clean: bool | None = None
    image: Image.Image | None = None


@dataclass
class RunSummary:
    """One run of a report.

    Args:
        name: `dissect`, or `dissect, seed 0` for one of several seeds; runs that differ in the seed alone share a
            colour.
        metrics: content of the run's `metrics.json`.
        log_history: `trainer.state.log_history`.
        score_histogram: correlations of the last epoch's candidates: `edges` `(n + 1,)` and the counts `kept` and
            `dropped`, each `(n,)`.
        best_kept: kept pairs, best first; the first 12 are saved and shown.
        worst_dropped: dropped pairs, worst first; the first 12 are saved and shown.
    """

    name: str
    metrics: dict[str, Any]
    log_history: list[dict[str, Any]] = field(default_factory=list)
    score_histogram: dict[str, Any] | None = None
    best_kept: list[PairSample] = field(default_factory=list)
    worst_dropped: list[PairSample] = field(default_factory=list)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the run to one JSON file; pictures become JPEG of at most 160 px, NaN and infinities become null."""
        return replace_file(path, json.dumps(self.to_dict(), allow_nan=False))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file that `save` writes."""
        content = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "metrics": self.metrics,
            "log_history": self.log_history,
            "score_histogram": self.score_histogram,
            "best_kept": [_sample_to_json(sample) for sample in (self.best_kept or [])[:MAX_SAMPLES]],
            "worst_dropped": [_sample_to_json(sample) for sample in (self.worst_dropped or [])[:MAX_SAMPLES]],
        }
        return cast(dict[str, Any], to_plain(content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RunSummary":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not JSON, lacks a part, or has another format version.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"path={str(path)!r} must be report data in JSON ({error}). Pass the file that RunSummary.save wrote."
            ) from error
        return cls.from_dict(content, path)

    @classmethod
    def from_dict(cls, content: Any, path: str | os.PathLike) -> "RunSummary":
        """Build the run from the content of a file that `save` wrote; `path` is its name in errors.

        Raises:
            ValueError: the content lacks a part, or has another format version.
        """
        version = content.get("format_version") if isinstance(content, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"path={str(path)!r} has format_version={version!r}, but hf_dissect {__version__} reads "
                f"{FORMAT_VERSION}. Pass a file that RunSummary.save of this version wrote."
            )
        names = ("name", "metrics", "log_history", "score_histogram", "best_kept", "worst_dropped")
        missing = [name for name in names if name not in content]
        if missing:
            raise ValueError(f"path={str(path)!r} lacks {missing}. Pass the file that RunSummary.save wrote.")
        parts = {name: content[name] for name in names}
        for name in ("best_kept", "worst_dropped"):
            parts[name] = [_sample_from_json(sample) for sample in parts[name]]
        return cls(**parts)


def thumbnail(image: Image.Image | None) -> str | None:
    """Encode `image` as base64 JPEG of at most 160 px without metadata; None if it is absent or cannot be decoded."""
    jpeg = thumbnail_jpeg(image)
    return None if jpeg is None else base64.b64encode(jpeg).decode("ascii")


def thumbnail_jpeg(image: Image.Image | None) -> bytes | None:
    """Encode `image` as `thumbnail` does, but return the content of a JPEG file."""
    if image is None:
        return None
    try:
        jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if jpeg and max(image.size) <= THUMBNAIL_SIZE:
            options: dict[str, Any] = {"quality": "keep"}  # a stored thumbnail, which would lose quality twice
        else:
            image = _put_on_white(image)
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            # The page magnifies pictures of a few pixels, and with them their JPEG artefacts.
            options = {"quality": 92, "subsampling": 0} if max(image.size) <= 64 else {"quality": 80}
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", comment=b"", **options)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None
    return buffer.getvalue()


def open_thumbnail(image: Image.Image | None) -> Image.Image | None:
    """Return the thumbnail of `image` without metadata, or None where it is absent or cannot be decoded."""
    jpeg = thumbnail_jpeg(image)
    return None if jpeg is None else _open_picture(jpeg)


def _open_picture(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def replace_file(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 under a temporary name and move it to `path`, so that nobody reads half a file."""
    # A caption may hold lone surrogates, which UTF-8 cannot express.
    return replace_bytes(path, text.encode("utf-8", "replace"))


def replace_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write `content` to `path` as `replace_file` writes text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _put_on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _sample_to_json(sample: PairSample) -> dict:
    content = {name: getattr(sample, name) for name in PairSample.__dataclass_fields__ if name != "image"}
    return {**content, "image": thumbnail(sample.image)}


def _sample_from_json(content: dict) -> PairSample:
    sample = PairSample(**content)
    if sample.correlation is None:
        sample.correlation = math.nan
    if sample.image is not None:
        sample.image = _open_picture(base64.b64decode(content["image"]))
    return sample


def to_plain(value: object) -> object:
    """Convert `value` to the types of strict JSON; numbers of NumPy and torch become plain, unknown objects text."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
