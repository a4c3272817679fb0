"""Decode one image in the collator's worker, or report why that is impossible."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class UnusableImage(ValueError):
    """An image that is missing or cannot be decoded, so that its row is skipped and counted."""


def decode_image(value: Any) -> Image.Image:
    """Decode an image to RGB.

    An animation gives its first frame, transparency becomes white, 16 bits are scaled to 8, and the picture is turned
    as the orientation tag of its camera asks.

    Args:
        value: `{"bytes", "path"}` of `datasets.Image(decode=False)`, bytes, a path, a PIL image or an array
            `(height, width[, 3])` of integers from 0 to 255.

    Raises:
        UnusableImage: If there is nothing, or if it is not an image, is truncated, or is larger than Pillow's limit
            for decompression bombs.
    """
    try:
        image = _open(value)
        image.seek(0)
        image.load()
        return _convert_to_rgb(_turn_upright(image))
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise UnusableImage(f"{type(error).__name__}: {error}") from error


def image_content(value: Any) -> bytes | None:
    """Return bytes that identify an image without decoding it: file content, path or pixels; None if missing."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, str | os.PathLike):
        return os.fspath(value).encode() or None
    if isinstance(value, Image.Image):
        return value.tobytes() + repr((value.size, value.mode)).encode()
    try:
        return np.ascontiguousarray(value).tobytes()
    except ValueError:  # lists of unequal lengths are not images, but two of them must still differ
        return repr(value).encode()


def is_feature_vector(value: Any) -> bool:
    """Return whether the "image" is a precomputed feature vector `(dim,)` rather than a picture."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.size > 0 and value.dtype.kind in "fiu"
    return isinstance(value, list) and len(value) > 0 and all(isinstance(number, int | float) for number in value)


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
    pixels = np.asarray(value)
    if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise UnusableImage(f"array of {pixels.dtype}, not of integers from 0 to 255")
    return Image.fromarray(pixels.astype(np.uint8))


def _turn_upright(image: Image.Image) -> Image.Image:
    # The pixels of a photograph lie as the camera was held; how, only its tag says.
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged tags raise nearly anything and leave the pixels intact
        pass
    return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert() would clip everything above 255.
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _stretch(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    # 32-bit integers and floats have no agreed scale: the darkest pixel becomes black, the lightest white.
    pixels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(pixels).all():
        raise UnusableImage("pixels that are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    return Image.fromarray(((pixels - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
