"""A web server on this machine that gives out tar shards, as plain files and as a data set of the Hub would."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

DATASET = "somebody/pairs"
_SHA = "0123456789abcdef0123456789abcdef01234567"


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder below `/`, and below the addresses that the Hub's client asks for `DATASET`.

    Attributes:
        honours_ranges: whether a request for a part of a file is granted, or answered with the whole file.
        breaks_after: bytes of an answer after which the connection breaks, once a file; None for never.
        requests: method, path and range of each request.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.honours_ranges = True
        self.breaks_after = None
        self.broken = set()
        self.requests = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    """The server while it runs."""
    with ShardServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path == f"/api/datasets/{DATASET}" or path.startswith(f"/api/datasets/{DATASET}/revision/"):
            return self._json({"id": DATASET, "sha": _SHA, "siblings": [], "private": False, "tags": []})
        if path.startswith(f"/api/datasets/{DATASET}/tree/main"):
            folder = self.server.folder / path.removeprefix(f"/api/datasets/{DATASET}/tree/main").lstrip("/")
            recursive = query.get("recursive", ["false"])[0].lower() in ("1", "true")
            return self._json(self._entries(folder.rglob("*") if recursive else folder.glob("*")))
        self._file(path.removeprefix(f"/datasets/{DATASET}/resolve/main"))

    def log_message(self, *_):
        pass

    def _entries(self, paths):
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": str(path.relative_to(self.server.folder)),
                "oid": "0",
                "size": 0 if path.is_dir() else path.stat().st_size,
            }
            for path in sorted(paths)
        ]

    def _json(self, value):
        content = json.dumps(value).encode()
        self._head(200, len(content), "application/json")
        self.wfile.write(content)

    def _file(self, path):
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, status = file.read_bytes(), 200
        if self.server.honours_ranges and self.headers.get("Range"):
            content, status = content[int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) :], 206
        self._head(status, len(content), "application/x-tar")
        if self.server.breaks_after is not None and path not in self.server.broken:
            self.server.broken.add(path)
            content = content[: self.server.breaks_after]
        self.wfile.write(content)

    def _head(self, status, length, kind):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", kind)
        self.end_headers()
