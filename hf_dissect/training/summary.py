"""Contract of the object that reports a run in `metrics.json`, in its report and on its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from hf_dissect.distributed import Ranks
from hf_dissect.report.data import PairSample, RunSummary
from hf_dissect.tracking.alerts import Alert


class Summary(Protocol):
    """Reporter of one kind of run."""

    def collect_metrics(self, model: nn.Module, log_history: list[dict]) -> dict[str, Any]:
        """Return the entries of `metrics.json` for this kind of run, with a `name`, without exchange between ranks."""

    def gather_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Return the entries of `metrics.json` that need an exchange; every rank calls this method."""

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the content of the card next to the metrics, as keyword arguments of its `write_files`."""

    def summarize(self, metrics: dict[str, Any]) -> tuple[RunSummary, str]:
        """Return the run so far and its title, for the live page, without exchange between ranks."""

    def show_pairs(self) -> Mapping[str, Sequence[PairSample]]:
        """Return the pairs that the trackers show at an evaluation, by the name of their group."""

    def find_alerts(self, log_history: Sequence[Mapping[str, Any]], progress: float) -> list[Alert]:
        """Return the reasons to look at the run; `progress` is the share of the steps that is done."""

    def write_report(self, folder: Path, metrics: dict[str, Any], log_history: list[dict]) -> None:
        """Write the report of the finished run; the process that saves calls this method."""
