"""Decoding of one image, in the collator's worker, with a reason when it cannot be had."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class UnusableImage(ValueError):
    """The image of a row is missing or cannot be decoded; the row is to be skipped and counted."""


def decode_image(value: Any) -> Image.Image:
    """Decode to RGB: the first frame of an animation, palettes and CMYK converted, transparency put on white.

    Args:
        value: `{"bytes", "path"}` of `datasets.Image(decode=False)`, bytes, a path, a PIL image or an array
            `(height, width[, 3])` of uint8.

    Raises:
        UnusableImage: nothing there, not an image, truncated, or larger than Pillow's decompression-bomb limit.
    """
    try:
        image = _open(value)
        image.seek(0)
        # Photographs keep their orientation in a tag that the pixels do not show.
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise UnusableImage(f"{type(error).__name__}: {error}") from error


def image_content(value: Any) -> bytes | None:
    """Bytes that identify an image without decoding it: its file content, its path, or its pixels; None if missing."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, str | os.PathLike):
        return os.fspath(value).encode()
    if isinstance(value, Image.Image):
        return value.tobytes() + repr((value.size, value.mode)).encode()
    return np.ascontiguousarray(value).tobytes()


def is_feature_vector(value: Any) -> bool:
    """Whether the "image" is a precomputed feature vector `(dim,)` rather than a picture."""
    return isinstance(value, list | np.ndarray) and np.ndim(value) == 1 and len(value) > 0


def _open(value: Any) -> Image.Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, bytes | str) and not value):
        raise UnusableImage("no image")
    if isinstance(value, Image.Image):
        return value.copy()
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str | os.PathLike):
        if not os.path.isfile(value):
            raise UnusableImage(f"no such file: {value}")
        return Image.open(value)
    return Image.fromarray(np.asarray(value, dtype=np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith(("I", "F")):
        # 16-bit and float greyscale: convert() would clip everything above 255.
        pixels = np.asarray(image, dtype=np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        image = Image.fromarray(((pixels - low) / max(high - low, 1e-12) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
