"""Report files of one selection run, made of its metrics, its logs and what its monitor observed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dissect.data.pairs import PairDataset
from hf_dissect.report.data import PairSample, RunSummary
from hf_dissect.report.selection import write_report
from hf_dissect.selection.monitor import ObservedPair, SelectionMonitor


def write_selection_report(
    folder: Path,
    metrics: Mapping[str, Any],
    log_history: list[dict],
    monitor: SelectionMonitor,
    dataset: Any,
    title: str,
) -> None:
    """Write `report_data.json` and `report.html`.

    Args:
        folder: Run folder.
        metrics: Content of `metrics.json`.
        log_history: Logs of the Trainer.
        monitor: Monitor of the selections.
        dataset: Training data, to show pairs with caption and picture if they are a `PairDataset`.
        title: Title of the page.
    """
    last = monitor.last_epoch
    # The priority of the other strategies is not a difference of scores.
    has_differential = metrics["strategy"] == "dissect"
    summary = RunSummary(
        name=metrics["name"],
        metrics=dict(metrics),
        log_history=log_history,
        score_histogram=monitor.score_histogram(),
        best_kept=[_sample(dataset, pair, has_differential) for pair in last.best_kept],
        worst_dropped=[_sample(dataset, pair, has_differential) for pair in last.worst_dropped],
    )
    summary.save(folder / "report_data.json")
    write_report(folder / "report.html", [summary], title=title)


def _sample(dataset: Any, pair: ObservedPair, has_differential: bool) -> PairSample:
    caption, picture = "", None
    if isinstance(dataset, PairDataset):
        index = dataset.find(pair.sample_id)
        caption, picture = dataset[index]["caption"], dataset.picture(index)
    return PairSample(
        sample_id=pair.sample_id,
        caption=caption,
        correlation=pair.correlation,
        differential=pair.priority if has_differential else None,
        is_clean=pair.is_clean,
        image=picture,
    )
