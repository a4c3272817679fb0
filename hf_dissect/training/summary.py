"""Contract of the object that reports a run: its part of `metrics.json`, its report, and what its card shows."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from hf_dissect.distributed import Ranks


class Summary(Protocol):
    """Reporter of one kind of run, made by its trainer."""

    def metrics(self, model: nn.Module, log_history: list[dict]) -> dict[str, Any]:
        """Return what `metrics.json` holds of this kind of run, with a `name`, as far as this process knows it."""

    def gathered_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Return the part of `metrics.json` that takes all ranks; called on all of them."""

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return what the card shows next to the metrics, keyword arguments of its `write_files`."""

    def write_report(self, folder: Path, metrics: dict[str, Any], log_history: list[dict]) -> None:
        """Write the report of the finished run; called on the process that saves."""
