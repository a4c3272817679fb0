"""Reads a run folder while the run writes it: half-written files and renamed checkpoints are nothing unusual there."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dissect.report.data import RunSummary
from hf_dissect.report.live import LIVE_FILE, LIVE_FILES, LOG_FILE, STOPPED, TRAINED, LiveRun, LogReader, find_digest
from hf_dissect.watching.audit_folder import SCORES_FILE, AuditFolder

METRICS_FILE, REPORT_DATA, STATE_FILE = "metrics.json", "report_data.json", "trainer_state.json"
MAX_LOGS = 2000
"""Logs of training that are drawn; of more, every second, third, ... one is."""


@dataclass(frozen=True)
class Seen:
    """A run as its folder shows it now.

    Attributes:
        summary: What is known of the run, with its logs.
        title: Title of the page.
        status: State of the run in words.
        running: True if the run may still change.
        is_distillation: True for a distillation, False for a run with selection.
    """

    summary: RunSummary
    title: str
    status: str
    running: bool
    is_distillation: bool


class RunFolder:
    """Reader of a run folder, which writes nothing.

    Args:
        folder: Run folder.

    Raises:
        ValueError: It is not a run folder; the message says what it is instead.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        _check(self.folder)
        self.audit = AuditFolder(self.folder)
        self._logs = LogReader(self.folder)

    def find_version(self) -> str:
        """Return a word that changes whenever a file that the page is made of changes."""
        marks = [_mark(self.folder / name) for name in (*LIVE_FILES, METRICS_FILE, REPORT_DATA)]
        newest = _find_newest_checkpoint(self.folder)
        return "-".join([*marks, newest.name if newest else "", self.audit.find_version()])

    def find_age(self) -> float | None:
        """Return the seconds since the run last wrote a file that the page is made of; None if there is none."""
        paths = [self.folder / name for name in (*LIVE_FILES, METRICS_FILE)]
        if (newest := _find_newest_checkpoint(self.folder)) is not None:
            paths.append(newest / STATE_FILE)
        times = [status.st_mtime for path in paths if (status := _stat(path)) is not None]
        return max(0.0, time.time() - max(times)) if times else None

    def read(self) -> Seen:
        """Read what the folder holds now, from the files of a run that trains, or that has ended.

        Raises:
            FileNotFoundError: The folder was removed.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was removed.")
        live = LiveRun.load(self.folder)
        earlier = {} if live is None else live.earlier
        results = {
            name: content
            for name in (METRICS_FILE, REPORT_DATA)
            if isinstance(content := _read_json(self.folder / name), dict)
            and (name not in earlier or earlier[name] != find_digest(self.folder / name))
        }
        metrics, report = results.get(METRICS_FILE, {}), _load_report(results.get(REPORT_DATA), self.folder)
        logs = self._logs.read()
        newest = _find_newest_checkpoint(self.folder)
        if logs is None and newest is not None:  # a run of an earlier version
            state = _read_json(newest / STATE_FILE)
            logs = state.get("log_history") if isinstance(state, dict) else None
        if report is not None and live is not None and report.metrics != metrics:
            report = None  # of another run than metrics.json
        base = report or (None if live is None else live.summary) or RunSummary(self.folder.resolve().name, {})
        logs = base.log_history if logs is None else logs
        known = {**base.metrics, **metrics}
        summary = RunSummary(
            str(known.get("name", base.name)),
            known,
            _thin([entry for entry in logs if isinstance(entry, dict)]),
            base.score_histogram,
            base.best_kept,
            base.worst_dropped,
        )
        done = bool(metrics) and "unfinished" not in metrics
        return Seen(
            summary,
            title=live.title if live is not None else summary.name,
            status=_describe_status(live, metrics, summary.log_history, newest),
            running=not done and (live is None or live.state != STOPPED),
            is_distillation="strategy" not in known and "method" in known,
        )


def _check(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise ValueError(
            f"{folder} is {what}; name the folder of a run (the training.output_dir of its recipe). It appears when "
            "training begins."
        )
    if (folder / STATE_FILE).is_file() and folder.name.startswith("checkpoint-"):
        raise ValueError(f"{folder} is a checkpoint; name the folder of its run: hf-dissect watch {folder.parent}")
    if any((folder / name).is_file() for name in (*LIVE_FILES, METRICS_FILE, REPORT_DATA)):
        if (below := _list_runs(folder)) and not any((folder / name).is_file() for name in LIVE_FILES):
            raise ValueError(f"{folder} holds several runs; name one of them: {', '.join(map(str, below[:5]))}")
        return
    if _find_newest_checkpoint(folder) is not None:
        return
    if below := _list_runs(folder):
        raise ValueError(f"{folder} holds several runs; name one of them: {', '.join(map(str, below[:5]))}")
    if (folder / SCORES_FILE).is_file():
        raise ValueError(f"{folder} holds an audit and not a run; open {folder / 'audit.html'} in a browser.")
    raise ValueError(
        f"{folder} is not a run folder: it has neither {LIVE_FILE} nor {LOG_FILE}, {METRICS_FILE} or a checkpoint. "
        "Name the training.output_dir of a run that has begun to train."
    )


def _list_runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if any((path / name).is_file() for name in LIVE_FILES))


def _describe_status(
    live: LiveRun | None, metrics: dict[str, Any], logs: list[dict[str, Any]], newest: Path | None
) -> str:
    if metrics and "unfinished" not in metrics:
        return "Finished."
    steps = [entry["step"] for entry in logs if isinstance(entry.get("step"), int)]
    if live is None:
        known = f" The last checkpoint is {newest.name}." if newest is not None else ""
        return f"Not known whether it still trains, as an earlier version of hf_dissect wrote it.{known}"
    step = max([live.step, *steps]) if live.state != STOPPED else live.step
    place = f"step {step:,} of {live.max_steps:,}" + (f", epoch {live.epoch:.2f}" if live.epoch else "")
    if live.state == STOPPED:
        return f"Stopped at {place}: {live.reason}"
    if live.state == TRAINED:
        return f"Trained to the end ({place}); final figures are computed."
    return f"Training: {place}."


def _thin(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out logs of training evenly where there are too many to draw; evaluations and the last log stay."""
    training = sum("loss" in entry for entry in logs)
    every = -(-training // MAX_LOGS)
    if every <= 1:
        return logs
    kept, number = [], 0
    for entry in logs:
        number += "loss" in entry
        if "loss" not in entry or number % every == 0 or number == training:
            kept.append(entry)
    return kept


def _load_report(content: Any, folder: Path) -> RunSummary | None:
    try:
        return None if content is None else RunSummary.from_dict(content, folder / REPORT_DATA)
    except Exception:  # whatever a damaged file or picture raises
        return None


def _find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; None without one."""
    numbered = []
    for path in _list(folder):
        number = path.name.removeprefix("checkpoint-")
        if path.name.startswith("checkpoint-") and number.isdecimal() and (path / STATE_FILE).is_file():
            numbered.append((int(number), path))
    return max(numbered)[1] if numbered else None


def _list(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:  # the folder was removed
        return


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _mark(path: Path) -> str:
    status = _stat(path)
    return "" if status is None else f"{status.st_ino:x}.{status.st_mtime_ns:x}.{status.st_size:x}"
