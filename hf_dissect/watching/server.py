"""Server of the page of a run: two answers, for this machine alone, and never a file of the folder."""

import errno
import json
import logging
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from hf_dissect.watching.page import POLICY, render_watched
from hf_dissect.watching.run_folder import RunFolder

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8050
TRIED_PORTS = 20
NAMES = ("127.0.0.1", "localhost", "::1")
"""Names of this machine in a Host header; a page elsewhere whose name was moved to 127.0.0.1 has another one."""
MOST_SHARE = 0.2
"""Largest share of the time in which the page is drawn, which takes time from the run."""
_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Drawer:
    """Page of a run, drawn once for each state of the folder, and not more often than the machine can bear.

    Args:
        folder: Reader of the folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()  # the figures are drawn by one thread at a time
        self._version, self._page = "", ""
        self._due = 0.0

    def find_version(self) -> dict[str, Any]:
        """Return the version of the page that `draw` returns now, and the seconds since the run last wrote."""
        version = self._folder.find_version()
        if version != self._version and time.monotonic() < self._due:
            version = self._version
        return {"version": version, "age": self._folder.find_age()}

    def draw(self) -> str:
        """Return the page."""
        with self._lock:
            version = self.find_version()["version"]
            if not self._page or version != self._version:
                start = time.monotonic()
                self._page, self._version = render_watched(self._folder, version), version
                self._due = time.monotonic() + (time.monotonic() - start) / MOST_SHARE
            return self._page


class Handler(BaseHTTPRequestHandler):
    """Handler of a request: the page, its version, or an error."""

    server: "WatchServer"
    server_version, sys_version = "hf_dissect", ""
    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        """Answer with the page or its version."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def do_POST(self) -> None:
        """Refuse what is not a request to read."""
        self.close_connection = True  # its body is not read
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", "Only GET and HEAD are answered.\n", Allow="GET, HEAD")

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_POST

    def _answer(self) -> None:
        if not is_this_machine(self.headers.get_all("Host", [])):
            text = "Open this page as http://127.0.0.1 or http://localhost; it is not for other names.\n"
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", text)
            return
        path = self.path.partition("?")[0]
        try:
            if path == "/":
                self._send(HTTPStatus.OK, "text/html", self.server.drawer.draw())
            elif path == "/version":
                self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.drawer.find_version()))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is one page here: /\n")
        except ConnectionError:  # the browser has left
            self.close_connection = True
        except Exception as error:
            self.server.report(error)
            text = "The page could not be drawn; the terminal of hf-dissect watch says why.\n"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text)

    def _send(self, status: HTTPStatus, kind: str, text: str, **headers: str) -> None:
        # Captions may hold lone surrogates, which UTF-8 cannot express.
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing, as a page asks every two seconds."""


class WatchServer(ThreadingHTTPServer):
    """Server on this machine alone.

    Args:
        folder: Reader of the run folder.
        port: Port; 0 for any that is free.
    """

    daemon_threads = True  # a browser that keeps a connection does not keep the server
    allow_reuse_address = sys.platform != "win32"  # there, a second server would take the port of the first

    def __init__(self, folder: RunFolder, port: int) -> None:
        self.drawer, self._reason = Drawer(folder), ""
        super().__init__((ADDRESS, port), Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def report(self, error: Exception) -> None:
        """Log why the page could not be drawn, once for the same reason."""
        if (reason := f"{type(error).__name__}: {error}") != self._reason:
            self._reason = reason
            trace = None if isinstance(error, OSError) else error
            logger.error("The page could not be drawn (%s); it is tried again.", reason, exc_info=trace)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a connection that broke; report anything else."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            logger.error("A request failed: %s", error)


def open_server(folder: RunFolder, port: int | None) -> WatchServer:
    """Open the server on a port.

    Args:
        folder: Reader of the run folder.
        port: Port, 0 for any; None for `DEFAULT_PORT` or, if it is taken, the next free one.

    Raises:
        ValueError: The port is taken, or may not be used.
    """
    for tried in range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS) if port is None else [port]:
        try:
            return WatchServer(folder, tried)
        except OSError as error:
            if port is not None and error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used by you"
                raise ValueError(
                    f"--port {port} {why}; name another one (0: any), or leave --port out for the next free one from "
                    f"{DEFAULT_PORT} on."
                ) from error
            if error.errno != errno.EADDRINUSE:
                raise
    last = DEFAULT_PORT + TRIED_PORTS - 1
    raise ValueError(f"The ports {DEFAULT_PORT} to {last} are all in use; name a free one with --port (0: any).")


def is_this_machine(hosts: list[str]) -> bool:
    """Check that a request names this machine, once, whatever the port, which a tunnel may have changed."""
    if len(hosts) != 1:
        return False
    try:
        parts = urlsplit(f"//{hosts[0]}")
        name, plain = parts.hostname, parts.username is None and not (parts.path or parts.query or parts.fragment)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        return False
    return plain and name in NAMES
