"""Decode one image in the collator's worker, or report why that is impossible."""

import io
import os
import string
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_dissect.data.encoded_pictures import as_numpy, begins_like_picture, find_encoded, is_cut_off, list_cleaned
from hf_dissect.data.pixels import UnusableImage, make_picture, scale_to_8_bits

__all__ = ["UnusableImage", "decode_image", "image_content", "is_feature_vector"]

_LARGEST_TO_CLEAN = 256 * 2**20
_SHOWN = 24
"""Number of bytes of a file that is not a picture in the message."""
_LONGEST_PATH = 200
_BASE64 = set(f"{string.ascii_letters}{string.digits}+/-_=\r\n")


def decode_image(value: Any, smallest_side: int | None = None) -> Image.Image:
    """Decode an image to RGB.

    An animation gives its first frame, transparency becomes white, 16 bits are scaled to 8 by the range of the format,
    and the picture is turned as the orientation tag of its camera asks. Damaged text, profiles and tags of a PNG or
    JPEG are left out.

    Args:
        value: `{"bytes", "path"}` of `datasets.Image(decode=False)`, the bytes in any buffer or array (see
            `find_encoded`), a path, a PIL image, or pixels (see `make_picture`).
        smallest_side: Number of pixels that both sides need; a JPEG is then decoded at a half, a quarter or an eighth
            of its size, if that has as many. None for the whole picture.

    Raises:
        UnusableImage: If there is nothing, or if it is not an image, is truncated, or is larger than Pillow's limit
            for decompression bombs. The message says why, and names the path.
    """
    path = find_path(value)
    try:
        image = _load(value, smallest_side)
        if not image.width * image.height:
            raise UnusableImage("a picture without pixels")
        return _convert_to_rgb(image)
    except UnusableImage as error:
        if error.path is None and path is not None:
            raise UnusableImage(error.problem, path) from error
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise UnusableImage(_describe(error, value), path) from error


def image_content(value: Any) -> bytes | None:
    """Return bytes that identify an image without decoding it: file content, path or pixels; None if missing."""
    if isinstance(value, dict):
        value = _choose_source(value)
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, str | os.PathLike):
        return os.fspath(value).encode("utf-8", "surrogatepass") or None
    if isinstance(value, Image.Image):
        return value.tobytes() + repr((value.size, value.mode)).encode()
    if isinstance(value, UnusableImage):
        return str(value).encode("utf-8", "surrogatepass")
    if (content := find_encoded(value)) is not None:
        return content or None
    try:
        return np.ascontiguousarray(as_numpy(value)).tobytes()
    except ValueError:  # lists of unequal lengths are not images, but two of them must still differ
        return repr(value).encode("utf-8", "surrogatepass")


def is_feature_vector(value: Any) -> bool:
    """Return whether the "image" is a precomputed feature vector `(dim,)` rather than a picture or its file."""
    value = as_numpy(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.size == 0 or value.dtype.kind not in "fiu":
            return False
    elif (
        not isinstance(value, list)
        or not value
        or not all(isinstance(part, int | float | np.number) for part in value)
    ):
        return False
    return not begins_like_picture(value)


def find_path(value: Any) -> str | None:
    """Return the path of an image in a file, or the name that came with its bytes; None without one."""
    if isinstance(value, dict):
        value = value.get("path")
    return os.fspath(value) if isinstance(value, str | os.PathLike) and value else None


def _choose_source(value: dict) -> Any:
    content = value.get("bytes")
    if content is not None and not isinstance(content, str):
        encoded = find_encoded(content)
        content = content if encoded is None else encoded
    return value.get("path") if content is None or (isinstance(content, bytes | str) and not content) else content


def _load(value: Any, smallest_side: int | None) -> Image.Image:
    if isinstance(value, UnusableImage):
        raise value
    if isinstance(value, dict):
        if isinstance(content := value.get("bytes"), str) and content:
            raise UnusableImage(_explain_text(content) or "text in place of the bytes of a file")
        value = _choose_source(value)
    if value is None or (isinstance(value, str) and not value):
        raise UnusableImage("no image")
    if isinstance(value, Image.Image):
        return _turn_upright(value.copy())
    if isinstance(value, str | os.PathLike):
        return _load_file(os.fspath(value), smallest_side)
    content = find_encoded(value)
    if content is None:
        return make_picture(value)
    if not content:
        raise UnusableImage("no image")
    try:
        return _read(io.BytesIO(content), smallest_side)
    except Image.DecompressionBombError:
        raise
    except Exception:
        cleaned = _read_cleaned(content, smallest_side)
        if cleaned is None:
            raise
        return cleaned


def _load_file(path: str, smallest_side: int | None) -> Image.Image:
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise UnusableImage("a folder, not a file", path)
        if hint := _explain_text(path):
            raise UnusableImage(hint, path if len(path) <= _LONGEST_PATH else f"{path[:40]}...")
        raise UnusableImage("no such file", path)
    size = os.path.getsize(path)
    if size == 0:
        raise UnusableImage("the file is empty", path)
    try:
        with open(path, "rb") as file:
            return _read(file, smallest_side)
    except Image.DecompressionBombError:
        raise
    except Exception:
        cleaned = None
        if size <= _LARGEST_TO_CLEAN:
            with open(path, "rb") as file:
                cleaned = _read_cleaned(file.read(), smallest_side)
        if cleaned is None:
            raise
        return cleaned


def _explain_text(text: str) -> str:
    """Return the reason why a text that is not the path of a file is of no use; empty for that of a missing file."""
    if "://" in text[:12]:
        return "an address, not a file; download it first"
    if text.startswith("data:") or (len(text) > 100 and set(text) <= _BASE64):
        return "base64 text; decode it to bytes first (base64.b64decode)"
    return ""


def _read(file: Any, smallest_side: int | None) -> Image.Image:
    image = Image.open(file)
    image.seek(0)
    if smallest_side is not None:
        image.draft(None, (smallest_side, smallest_side))  # without effect on other formats than JPEG
    image.load()
    return _turn_upright(image)


def _read_cleaned(content: bytes, smallest_side: int | None) -> Image.Image | None:
    # Text, profiles and tags may be damaged, or longer than Pillow accepts, in a file whose pixels are whole.
    for cleaned in list_cleaned(content):
        try:
            return _read(io.BytesIO(cleaned), smallest_side)
        except Exception:  # Pillow's plugins raise nearly anything on damaged files
            continue
    return None


def _describe(error: Exception, value: Any) -> str:
    content = _read_content(value)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError) and content:
        start = repr(content[:_SHOWN]) if any(content[:_LARGEST_TO_CLEAN]) else "zeros alone"
        text = f"{type(error).__name__}: not a picture, the file holds {start}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{type(error).__name__}: {error.strerror}"  # without the path, which is named apart
    if content and "truncated" not in text and is_cut_off(content):
        text = f"truncated ({text})"
    return " ".join(text.split())


def _read_content(value: Any) -> bytes | None:
    """Return the bytes of an encoded image, in memory or in a file; None for others."""
    source = _choose_source(value) if isinstance(value, dict) else value
    if isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                return file.read(_LARGEST_TO_CLEAN)
        except (OSError, ValueError):
            return None
    return None if isinstance(source, Image.Image) else find_encoded(source)


def _turn_upright(image: Image.Image) -> Image.Image:
    # The pixels of a photograph lie as the camera was held; how, only its tag says.
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged tags raise nearly anything and leave the pixels intact
        pass
    return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = scale_to_8_bits(image)  # convert() would clip everything above 255
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
