"""Run folders as a run leaves them while it trains, made without training, and a server for them."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from hf_dissect.report.data import PairSample, RunSummary
from hf_dissect.report.live import LiveRun, append_log, restart_log
from hf_dissect.watching.run_folder import RunFolder
from hf_dissect.watching.server import WatchServer, open_server

PICTURE = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))
HISTOGRAM = {"edges": [0.0, 50.0, 100.0], "kept": [10, 30], "dropped": [30, 10]}
METRICS = {"name": "dissect", "strategy": "dissect", "seed": 0, "steps": 10, "selection": {"kept_share": 0.5}}


def make_live(title: str = "mine: dissect", captions: tuple[str, ...] = ("a dog",), **fields) -> LiveRun:
    """The state of a run with a pair for each caption."""
    pairs = [PairSample(number, caption, 30.0, 1.5, None, PICTURE) for number, caption in enumerate(captions)]
    metrics = METRICS | fields.pop("metrics", {})
    summary = RunSummary(metrics["name"], metrics, [], HISTOGRAM, pairs, pairs[:1])
    return LiveRun(summary, title, **{"step": 10, "max_steps": 100, "epoch": 0.5} | fields)


def make_log(step: int, **more) -> dict:
    """The log of a step of training."""
    return {"loss": 5 - step / 50, "learning_rate": 1e-3, "selection_noise_kept": 0.3, "step": step, **more}


def make_run(folder: Path, steps: int = 3, **live) -> Path:
    """The folder of a run that trains, with a log every ten steps."""
    folder.mkdir(parents=True, exist_ok=True)
    restart_log(folder, [])
    for number in range(1, steps + 1):
        append_log(folder, make_log(10 * number, selection_estimated_mismatched=0.25))
    make_live(**live).save(folder)
    return folder


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[WatchServer]:
    """A server of the folder."""
    with open_server(RunFolder(folder), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def serve_one_visit(server: WatchServer, poll_interval: float = 0.5) -> None:
    """Serve, in the place of `serve_forever`, until the page was read once."""

    def visit() -> None:
        try:
            assert ask(server)[0] == 200
        finally:
            server.shutdown()

    thread = threading.Thread(target=visit)
    thread.start()
    ThreadingHTTPServer.serve_forever(server, poll_interval)
    thread.join()


def ask(server: WatchServer, path: str = "/", method: str = "GET", **headers) -> tuple[int, dict, str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def ask_version(server: WatchServer) -> dict:
    """What the script of the page asks for."""
    return json.loads(ask(server, "/version")[2])


def list_files(folder: Path) -> dict[str, tuple]:
    """Content and time of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted([folder, *folder.rglob("*")])
    }
