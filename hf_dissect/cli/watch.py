"""`hf-dissect watch`: the report of a run while it trains, on a page of this machine."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Show the report of a run in a browser while it trains."
EPILOG = """examples:
  hf-dissect watch runs/quickstart
  hf-dissect watch runs/quickstart --port 8080 --no-browser
  ssh -L 8050:localhost:8050 machine                 then open http://localhost:8050 here

The page is for this machine alone (127.0.0.1), renews itself, and needs nothing but the run folder, which is never
written to."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "watch", _watch, SUMMARY, EPILOG)
    parser.add_argument("folder", metavar="RUN", help="run folder, of a run that trains or has ended")
    parser.add_argument(
        "--port", type=parse_port, help="port of the page (default: 8050, or the next free one; 0: any)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


def parse_port(text: str) -> int:
    """Parse a port, an integer from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: an integer from 0 to 65535")
    return int(text)


def _watch(options: argparse.Namespace) -> None:
    from hf_dissect.watching.run_folder import RunFolder
    from hf_dissect.watching.server import DEFAULT_PORT, open_server

    server = open_server(RunFolder(options.folder), options.port)
    with server:
        port = server.server_address[1]
        if options.port is None and port != DEFAULT_PORT:
            print(f"Port {DEFAULT_PORT} is in use; the page is on port {port}.")
        print(f"{options.folder}: {server.url}  (Ctrl-C ends)", flush=True)
        if not options.no_browser and _has_screen():
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nEnded; the run continues.", flush=True)


def _has_screen() -> bool:
    """Return True if a browser would open a window; one in the terminal would hide what the command prints."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
