"""Open a text file, compressed or not, in the encoding that it has, and report exactly where it has another one."""

import codecs
import gzip
import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

COMPRESSED = ".gz"

_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOKED_AT = 1 << 16

logger = logging.getLogger(__name__)


def check_encoding(encoding: str) -> None:
    """Check that Python knows a text encoding.

    Raises:
        ValueError: If not.
    """
    try:
        known = codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        known = None
    if known is None:
        raise ValueError(
            f"data.encoding is {encoding!r}, which is not a text encoding. Set it to utf-8, cp1252, latin-1, utf-16 "
            "or another one that Python knows, or to null for UTF-8 and files with a byte order mark."
        )


@contextmanager
def reading_text(file: Path, encoding: str | None) -> Iterator[TextIO]:
    """Open a text file; lines keep their ends, and a byte order mark decides the encoding and is left out.

    Args:
        file: Text file; `.gz` is decompressed.
        encoding: Encoding of a file without a byte order mark; None for UTF-8.

    Raises:
        ValueError: If the bytes are not text of this encoding, or the file is cut off; the message names the file,
            the line and the byte.
    """
    actual = find_encoding(file, encoding)
    try:
        with open_bytes(file) as stream, io.TextIOWrapper(stream, encoding=actual, newline="") as text:
            yield text
    except UnicodeError as error:
        raise ValueError(_describe_wrong_encoding(file, actual, error)) from error


def read_text(file: Path, encoding: str | None) -> str:
    """Return the text of a whole file; see `reading_text`."""
    with reading_text(file, encoding) as text:
        return text.read()


def holds_byte(file: Path, byte: bytes) -> bool:
    """Return whether a byte occurs in a file, decompressed."""
    with open_bytes(file) as stream:
        return any(byte in block for block in iter(lambda: stream.read(1 << 20), b""))


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed.

    Raises:
        ValueError: If it is compressed and damaged.
    """
    compressed = file.suffix.lower() == COMPRESSED
    try:
        with cast(BinaryIO, gzip.open(file, "rb")) if compressed else open(file, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{str(file)!r} is not a whole .gz file ({error}). It may be cut off: copy it again."
        ) from error


def find_encoding(file: Path, encoding: str | None) -> str:
    """Return the encoding of the byte order mark, or else the one given, or else UTF-8.

    Raises:
        ValueError: If the text would hold zero bytes, as UTF-16 does when it is read as something else.
    """
    with open_bytes(file) as stream:
        head = stream.read(_LOOKED_AT)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    actual = encoding or "utf-8"
    likely = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    if codecs.lookup(actual).name == "utf-16":
        return likely  # Python asks for a mark otherwise
    if b"\0" in head and not codecs.lookup(actual).name.startswith(("utf-16", "utf-32")):
        raise ValueError(
            f"{str(file)!r} holds zero bytes, so it is not text in {actual} (data.encoding {encoding!r}). Set "
            f"data.encoding, probably to {likely}."
        )
    if encoding is not None and not head.isascii() and _is_utf8(head) and not _is_unicode(actual):
        logger.warning(
            "%s is read as data.encoding %s, but is UTF-8 as well: if captions look garbled, leave it out.",
            file,
            encoding,
        )
    return actual


def _is_unicode(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith("utf")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _describe_wrong_encoding(file: Path, encoding: str, error: UnicodeError) -> str:
    """Return a message with the line and the byte at which a file stops being text of an encoding."""
    with open_bytes(file) as stream:
        content = stream.read()
    place, byte = "", ""
    try:
        content.decode(encoding)
    except UnicodeDecodeError as found:
        line = content[: found.start].decode(encoding, errors="replace").count("\n") + 1
        place, byte = f", line {line}", f" (byte 0x{content[found.start]:02x} at position {found.start})"
    except UnicodeError:
        byte = f" ({error})"
    ways = "cp1252 or latin-1 for Western European text, gbk, shift_jis, utf-16"
    return (
        f"{str(file)!r}{place}: not text in the encoding {encoding}{byte}. Set data.encoding to that of the file, "
        f"such as {ways}, or mend the line."
    )
