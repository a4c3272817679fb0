"""Recognise an encoded picture in whatever buffer or array holds its bytes, and free it of damaged side data."""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

_LONGEST_START = 32
_DIB_HEADERS = {12, 40, 52, 56, 64, 108, 124}
_STARTS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00\x08",
    b"MM\x00+\x00\x08",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    b"\xffO\xffQ\x00",
    b"8BPS\x00\x01",
    b"DDS \x7c",
    b"qoif",
)
_PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_JPEG_PICTURE = {0xE0, 0xEE}  # JFIF and Adobe, which say how colours are stored


def as_numpy(value: Any) -> Any:
    """Return a torch tensor or an Arrow array as a NumPy array, an Arrow scalar as its value, others unchanged."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, pa.Scalar):
        return as_numpy(value.as_py())
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.to_numpy() if isinstance(value, pa.ChunkedArray) else value.to_numpy(zero_copy_only=False)
    return value


def find_encoded(value: Any) -> bytes | None:
    """Return the bytes of a file that is held in memory; None for anything else, such as a path or an array of pixels.

    Args:
        value: Any buffer (bytes, bytearray, memoryview, `pa.Buffer`, `numpy.void`, `array.array`), a binary file
            object such as `io.BytesIO`, an array or tensor `(n,)` of 8-bit integers, or a list or an array `(n,)` of
            other integers that begins as the file of a picture does.
    """
    value = as_numpy(value)
    if isinstance(value, np.bytes_):
        return bytes(value) + bytes(4096)  # NumPy cuts zeros off the end
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, pa.Buffer):
        return value.to_pybytes()
    if isinstance(value, np.void):
        return value.tobytes()
    if isinstance(value, np.ndarray):
        return _find_in_array(value)
    if isinstance(value, list | tuple):
        return _join_bytes(np.asarray(value)) if _is_list_of_file(value) else None
    if callable(getattr(value, "read", None)):
        return _read_file_object(value)
    try:
        view = memoryview(value)
    except TypeError:
        return None
    return view.tobytes() if view.ndim == 1 and view.itemsize == 1 else None


def is_byte_array(value: Any) -> bool:
    """Return whether a value is an array or a tensor `(n,)` of 8-bit integers, be it a file or a vector."""
    value = as_numpy(value)
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in (np.uint8, np.int8)


def begins_like_picture(values: Any) -> bool:
    """Return whether a list or an array `(n,)` of integers begins as the file of a picture does."""
    start = np.asarray(values[:_LONGEST_START])
    if start.ndim != 1 or start.size < 8 or not _holds_bytes(start):
        return False
    content = _join_bytes(start)
    if content.startswith(_STARTS) or content[4:8] == b"ftyp":
        return True
    if content.startswith(b"RIFF"):
        return content[8:12] == b"WEBP"
    if content.startswith(b"BM"):
        return len(content) >= 18 and int.from_bytes(content[14:18], "little") in _DIB_HEADERS
    return content[:1] == b"P" and content[1:2] in b"123456fF" and content[2:3].isspace()


def list_cleaned(content: bytes) -> Iterator[bytes]:
    """Yield a PNG or JPEG without text, profile and other side data, first with its orientation tag, then without."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        yield b"".join(_keep_png_chunks(content, {*_PNG_PICTURE, b"eXIf"}))
        yield b"".join(_keep_png_chunks(content, _PNG_PICTURE))
    elif content.startswith(b"\xff\xd8\xff"):
        yield b"".join(_keep_jpeg_segments(content, {*_JPEG_PICTURE, 0xE1}))
        yield b"".join(_keep_jpeg_segments(content, _JPEG_PICTURE))


def is_cut_off(content: bytes) -> bool:
    """Return whether a PNG, JPEG, GIF or WebP lacks its end."""
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-4096:]
    if content.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in content[-4096:]
    if content.startswith(b"GIF8"):
        return not content.rstrip(b"\x00").endswith(b";")
    return content.startswith(b"RIFF") and len(content) < int.from_bytes(content[4:8], "little")


def _holds_bytes(values: np.ndarray) -> bool:
    """Return whether integers are bytes, from 0 to 255 or from -128 to 127."""
    if values.dtype.kind not in "iu":
        return False
    low, high = values.min(), values.max()
    return (low >= 0 and high <= 255) or (low >= -128 and high <= 127)


def _join_bytes(values: np.ndarray) -> bytes:
    return (values.astype(np.int64) & 0xFF).astype(np.uint8).tobytes()


def _find_in_array(value: np.ndarray) -> bytes | None:
    if value.ndim == 0:
        return find_encoded(value.item()) if value.dtype.kind in "SVO" else None
    if value.ndim == 2 and 1 in value.shape and value.dtype.kind in "iu":
        value = value.ravel()  # a file in a row or a column of its own
        return _join_bytes(value) if _is_list_of_file(value) else None
    if value.ndim != 1:
        return None
    if value.dtype in (np.uint8, np.int8) or (value.dtype.kind == "S" and value.dtype.itemsize == 1):
        return value.tobytes()
    return _join_bytes(value) if value.dtype.kind in "iu" and _is_list_of_file(value) else None


def _is_list_of_file(values: Any) -> bool:
    if len(values) < 8 or isinstance(values[0], list | tuple | np.ndarray | str) or not begins_like_picture(values):
        return False
    return _holds_bytes(np.asarray(values))


def _read_file_object(file: Any) -> bytes | None:
    try:
        if callable(getattr(file, "getvalue", None)):
            content = file.getvalue()
        else:
            if file.seekable():
                file.seek(0)
            content = file.read()
    except (OSError, ValueError):  # closed, or on a disk that fails
        return b""
    return content if isinstance(content, bytes) else None


def _keep_png_chunks(content: bytes, kept: set[bytes]) -> Iterator[bytes]:
    yield content[:8]
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 12 + length
        if content[place + 4 : place + 8] in kept:
            yield content[place:end]
        place = end
    yield content[place:]


def _keep_jpeg_segments(content: bytes, kept: set[int]) -> Iterator[bytes]:
    yield content[:2]
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xDA:
            break
        end = place + 1 if marker == 0xFF else place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker != 0xFF and not ((0xE0 <= marker <= 0xEF or marker == 0xFE) and marker not in kept):
            yield content[place:end]
        place = end
    yield content[place:]
