"""A file on a web server as one stream that continues at the same byte after the connection breaks.

Written by hand, since none of the ways in which fsspec opens an http(s) address suits a shard, which is read from its
first to its last byte for as long as a model trains on it. Read in blocks, each shard costs a request for its size and
fails on servers that ignore ranges. Read as a stream, it ends after five minutes or when the connection breaks, and
what had arrived but was not read yet is lost, so that the stream could not continue where it broke. See
`fsspec.implementations.http`.
"""

import http.client
import io
import time
import urllib.request
from typing import Any

_SECONDS_TO_ANSWER = 60
_PAUSES = (0, 1, 5, 20)  # seconds before each retry
_BROKEN = (OSError, EOFError, http.client.HTTPException)


class WebFile(io.RawIOBase):
    """A file of a web server, readable once from its beginning to its end.

    Args:
        url: Address, `http://...` or `https://...`.

    Raises:
        OSError: If the server does not answer or has no such file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = 0
        self._size: int | None = None
        self._response = self._connect()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read arrived bytes into the buffer and return their number, 0 at the end of the file.

        Raises:
            OSError, EOFError, http.client.HTTPException: If the connection breaks again after every retry.
        """
        broken: Exception = EOFError()
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
        """Close the connection."""
        if not self.closed:
            self._response.close()
        super().close()

    def _connect(self) -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={self._place}-"} if self._place else {}
        response = urllib.request.urlopen(
            urllib.request.Request(self._url, headers=headers), timeout=_SECONDS_TO_ANSWER
        )
        # A server that ignores ranges sends the whole file again.
        skipped = 0 if response.status == 206 else self._place
        length = response.headers.get("Content-Length")
        self._size = None if length is None else int(length) + self._place - skipped
        while skipped:
            read = len(response.read(min(skipped, 1 << 20)))
            if not read:
                raise EOFError(f"it ends before byte {self._place}")
            skipped -= read
        return response
