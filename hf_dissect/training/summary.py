"""Contract of the object that reports a run in `metrics.json`, in its report and on its card."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from hf_dissect.distributed import Ranks


class Summary(Protocol):
    """Reporter of one kind of run."""

    def collect_metrics(self, model: nn.Module, log_history: list[dict]) -> dict[str, Any]:
        """Return the entries of `metrics.json` for this kind of run, with a `name`, without exchange between ranks."""

    def gather_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Return the entries of `metrics.json` that need an exchange; every rank calls this method."""

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the content of the card next to the metrics, as keyword arguments of its `write_files`."""

    def write_report(self, folder: Path, metrics: dict[str, Any], log_history: list[dict]) -> None:
        """Write the report of the finished run; the process that saves calls this method."""
