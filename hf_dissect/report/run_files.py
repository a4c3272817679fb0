"""Report files of one selection run, made of its metrics, its logs and what its monitor observed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_dissect.data.first_pairs import keep_random_state
from hf_dissect.data.pairs import PairDataset
from hf_dissect.report.data import PairSample, RunSummary, open_thumbnail
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


class PairReader:
    """Reader of the pairs that a run shows while it trains, with thumbnails; it remembers those that it read last.

    The random streams of the training are not touched, whatever a transform of the data draws.

    Args:
        dataset: Training data.
        has_differential: True if the priority of a pair is its differential.
    """

    def __init__(self, dataset: Any, has_differential: bool) -> None:
        self._dataset, self._has_differential = dataset, has_differential
        self._last: dict[int, PairSample] = {}

    def read(self, monitor: SelectionMonitor) -> dict[str, list[PairSample]]:
        """Return the extreme pairs of the current epoch, as `best_kept` and `worst_dropped`."""
        last = monitor.last_epoch
        with keep_random_state():
            pairs = {"best_kept": self._read(last.best_kept), "worst_dropped": self._read(last.worst_dropped)}
        self._last = {pair.sample_id: pair for group in pairs.values() for pair in group}
        return pairs

    def _read(self, pairs: Sequence[ObservedPair]) -> list[PairSample]:
        return [self._read_one(pair) for pair in pairs]

    def _read_one(self, pair: ObservedPair) -> PairSample:
        if (last := self._last.get(pair.sample_id)) is None:
            read = _sample(self._dataset, pair, self._has_differential)
            return replace(read, image=open_thumbnail(read.image))
        differential = pair.priority if self._has_differential else None
        return replace(last, correlation=pair.correlation, differential=differential, is_clean=pair.is_clean)


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
