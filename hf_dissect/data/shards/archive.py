"""Read the members of a tar archive from its first to its last byte, and report where it is damaged.

`tarfile` parses the headers. It takes a block of zeros, a damaged header and the end of the file all for the end of
the archive: a download that stopped, or a hole of zeros in the middle, would be a smaller archive. Here, an archive
ends with its end blocks and nothing else.
"""

import bz2
import gzip
import io
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from hf_dissect.data.split_files import summarize_error

BLOCK = tarfile.BLOCKSIZE
_RECORDS = (tarfile.RECORDSIZE, *(BLOCK << power for power in range(5, 12)))
"""Sizes to a multiple of which writers pad an archive with zeros: 20 blocks, or 32 to 2,048 (`tar -b`).

Pages of a file system are smaller: a page of zeros between two members is a hole, not the end of an archive.
"""
_PIECE = 1 << 20

Opener = Callable[[Any], Any]
_DECOMPRESSORS: dict[bytes, Opener] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
}


class BadShard(ValueError):
    """Error for a shard that cannot be read to its end; the message is the reason, without the name of the shard."""


class Member(NamedTuple):
    r"""A file in an archive.

    Args:
        name: Name with its folders; bytes that are not UTF-8 are written as `\xNN`.
        content: Content. For a file that is not wanted, one byte, or none if it is empty.
        archive: Number of the archive in the file, from 0: archives may be appended to each other.
        is_link: True for a link, which has no content of its own.
    """

    name: str
    content: bytes
    archive: int = 0
    is_link: bool = False


def read_members(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yield files and links of a tar archive, plain or compressed, in order; archives may be appended to each other.

    An archive ends with two blocks of zeros, or with more that fill a record (see `_RECORDS`). At the end of the file,
    one block is enough, and any number that would fit into a record of 20 blocks.

    Args:
        file: File that is read once, from its beginning to its end.
        wanted: Function from the name of a member to whether its content is needed.

    Raises:
        BadShard: If the archive is damaged or not an archive. The message has the offset, in the unpacked archive.
        OSError: If the file cannot be read.
    """
    stream = _ForwardFile(file)
    magic = stream.read(max(map(len, _DECOMPRESSORS)))
    stream.put_back(magic)
    opener = next((opener for start, opener in _DECOMPRESSORS.items() if magic.startswith(start)), None)
    try:
        if opener is not None:
            stream = _ForwardFile(opener(stream))
        for number in itertools.count():
            begin = stream.tell()
            yield from _read_archive(stream, wanted, number)
            if not _pass_end(stream, begin):
                return
    except BadShard:
        raise
    except tarfile.ReadError as error:
        raise BadShard(f"the file is cut off within a member, before byte {stream.tell() + 1}") from error
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk or the connection, not the content
            raise
        raise BadShard(f"damaged or cut off at byte {stream.tell()}: {summarize_error(error)}") from error


class _ForwardFile:
    """A file that is read once from its beginning, has a position, and passes over what is not needed."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self._place = 0
        self._waiting = b""
        # Only a file of this machine: elsewhere, a seek can cost a new request, or cannot be done.
        self._can_seek = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO) and file.seekable()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, fewer than `size` only at the end of the file."""
        pieces, missing = [self._waiting], size - len(self._waiting)
        if size >= 0 and missing < 0:
            pieces, self._waiting = [self._waiting[:size]], self._waiting[size:]
        else:
            self._waiting = b""
            while missing > 0 or size < 0:
                piece = self._file.read(missing if size >= 0 else _PIECE)
                if not piece:
                    break
                pieces.append(piece)
                missing -= len(piece)
        content = b"".join(pieces)
        self._place += len(content)
        return content

    def put_back(self, content: bytes) -> None:
        """Let `content` be read next; it is what was read last."""
        self._waiting = content + self._waiting
        self._place -= len(content)

    def tell(self) -> int:
        """Return the number of bytes before the next one."""
        return self._place

    def seek(self, place: int) -> int:
        """Pass over the bytes before `place`, which lies ahead."""
        if self._can_seek and place - self._place > len(self._waiting):
            self._file.seek(place - self._place - len(self._waiting), io.SEEK_CUR)
            self._waiting, self._place = b"", place
        while self._place < place and self.read(min(place - self._place, _PIECE)):
            pass
        return self._place


class _Header(tarfile.TarInfo):
    """Header of a member that says what is wrong, where `tarfile` would end the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        stream = cast(_ForwardFile, archive.fileobj)
        place = stream.tell()
        block = stream.read(BLOCK)
        stream.put_back(block)
        if not block:
            raise BadShard(
                f"the file ends at byte {place} without the blocks of zeros that end an archive, so it was cut off; "
                "if its writer leaves them out, append 1,024 zero bytes"
                if place
                else "the file is empty (0 bytes)"
            )
        if len(block) < BLOCK:
            raise BadShard(f"the file is cut off in the header at byte {place}")
        if not block.strip(b"\0"):
            return super().fromtarfile(archive)  # raises what ends the archive for `tarfile`
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            what = f"the header at byte {place} is damaged" if place else "the file does not begin with a header"
            raise BadShard(f"{what}: {error}") from None


def _read_archive(stream: _ForwardFile, wanted: Callable[[str], bool], number: int) -> Iterator[Member]:
    """Yield the members of one archive, to the first block of zeros, which has then been read."""
    archive = tarfile.TarFile(
        fileobj=cast(BinaryIO, stream), tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    )
    while (header := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # they would add up over the whole shard
        name = header.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if header.issym() or header.islnk():
            yield Member(name, b"", number, True)
        elif header.isfile():
            content = b"?" if header.size else b""
            if header.size and wanted(name):
                content = cast(BinaryIO, archive.extractfile(header)).read()
            yield Member(name, content, number)


def _pass_end(stream: _ForwardFile, begin: int) -> bool:
    """Pass over the zeros after an archive, and return whether another archive follows.

    Args:
        stream: File, after the first block of zeros.
        begin: Place of the first byte of the archive.

    Raises:
        BadShard: If these zeros do not end an archive.
    """
    end = stream.tell() - BLOCK
    while (block := stream.read(BLOCK)) and not block.strip(b"\0"):
        pass
    stream.put_back(block)
    place = stream.tell()
    zeros = place - end
    # The zeros of one record at most, in addition to the two end blocks.
    padded = any(zeros < record + 2 * BLOCK and (place - begin) % record == 0 for record in _RECORDS)
    if not block:
        if padded or zeros < tarfile.RECORDSIZE + 2 * BLOCK:
            return False
        raise BadShard(f"from byte {end} on, there are {zeros} bytes of zeros, more than end an archive")
    if len(block) == BLOCK and (padded or zeros == 2 * BLOCK) and zeros >= 2 * BLOCK:
        return True  # what follows is an archive, or its first header is damaged
    raise BadShard(f"from byte {end} on, {zeros} bytes are zeros, and other bytes follow")
