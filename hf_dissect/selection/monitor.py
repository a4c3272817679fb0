"""Observation of the selection: running metrics for the logs, distributions and extreme pairs for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

NUM_EXTREMES = 12
HISTOGRAM_EDGES = np.linspace(0, 100, 51)


@dataclass
class ObservedPair:
    """One candidate at the time of its selection.

    Args:
        sample_id: Id of the pair.
        priority: Value that the rule ranked by.
        correlation: Correlation under the weights of that time, 0 to 100.
        is_clean: True for a matched pair; None if the truth is unknown.
    """

    sample_id: int
    priority: float
    correlation: float
    is_clean: bool | None


@dataclass
class _Sums:
    """Counts and sums over some steps."""

    candidates: int = 0
    kept: int = 0
    correlation_kept: float = 0.0
    correlation_dropped: float = 0.0
    scored_kept: int = 0
    scored_dropped: int = 0
    noise_candidates: int = 0
    noise_kept: int = 0
    truth_known: bool = False
    planned: bool = False
    loaded: int = 0
    scored: int = 0
    visits_known: bool = False
    visits_kept: float = 0.0
    visits_candidates: float = 0.0

    def add(
        self,
        kept: np.ndarray,
        correlation: np.ndarray | None,
        is_clean: np.ndarray | None,
        loaded: np.ndarray | None = None,
        scored: np.ndarray | None = None,
        visits: np.ndarray | None = None,
    ) -> None:
        """Add one selection of `B` candidates, `(B,)` each."""
        if visits is not None:
            self.visits_known = True
            self.visits_kept += float(visits[kept].sum())
            self.visits_candidates += float(visits.sum())
        self.candidates += len(kept)
        self.kept += int(kept.sum())
        if loaded is not None and scored is not None:
            self.planned = True
            self.loaded += int(loaded.sum())
            self.scored += int(scored.sum())
        if correlation is not None:
            known = ~np.isnan(correlation)
            self.correlation_kept += float(correlation[known & kept].sum())
            self.correlation_dropped += float(correlation[known & ~kept].sum())
            self.scored_kept += int((known & kept).sum())
            self.scored_dropped += int((known & ~kept).sum())
        if is_clean is not None:
            self.truth_known = True
            self.noise_candidates += int((~is_clean).sum())
            self.noise_kept += int((~is_clean & kept).sum())

    def join(self, others: "Sequence[_Sums]") -> "_Sums":
        """Return the sums over these and further steps, added in this order."""
        joined = _Sums(**asdict(self))
        for other in others:
            for name, value in asdict(other).items():
                own = getattr(joined, name)
                setattr(joined, name, own or value if isinstance(own, bool) else own + value)
        return joined

    def figures(self) -> dict[str, float]:
        """Return shares and means, as far as there are candidates, scores and truths."""
        metrics: dict[str, float] = {}
        if self.candidates:
            metrics["kept_share"] = self.kept / self.candidates
            if self.planned:
                metrics["loaded_share"] = self.loaded / self.candidates
                metrics["scored_share"] = self.scored / self.candidates
        if self.visits_known and self.kept:
            metrics["visits_kept"] = self.visits_kept / self.kept
            metrics["visits_candidates"] = self.visits_candidates / self.candidates
        if self.scored_kept:
            metrics["correlation_kept"] = self.correlation_kept / self.scored_kept
        if self.scored_dropped:
            metrics["correlation_dropped"] = self.correlation_dropped / self.scored_dropped
        if self.truth_known and self.kept:
            metrics["noise_kept"] = self.noise_kept / self.kept
            metrics["noise_candidates"] = self.noise_candidates / self.candidates
        return metrics


@dataclass
class _LastEpoch:
    """Observations of the current epoch only, for the report."""

    epoch: int = -1
    sums: _Sums = field(default_factory=_Sums)
    kept_counts: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64))
    dropped_counts: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64))
    best_kept: list[ObservedPair] = field(default_factory=list)
    worst_dropped: list[ObservedPair] = field(default_factory=list)
    priorities: list[np.ndarray] = field(default_factory=list)
    truths: list[np.ndarray] = field(default_factory=list)

    def add_extremes(self, best: list[ObservedPair], worst: list[ObservedPair]) -> None:
        """Add further kept and dropped pairs, of which the extreme ones stay."""
        self.best_kept = sorted(self.best_kept + best, key=lambda pair: -pair.priority)[:NUM_EXTREMES]
        self.worst_dropped = sorted(self.worst_dropped + worst, key=lambda pair: pair.priority)[:NUM_EXTREMES]


class SelectionMonitor:
    """Observer of each selection, with metrics since the last log, of the last epoch, and of the run.

    Of several processes, each observes its own candidates, see `join_monitors`.
    """

    def __init__(self) -> None:
        self.run = _Sums()
        self.last_epoch = _LastEpoch()
        self._since_log = _Sums()

    def observe(
        self,
        epoch: int,
        sample_id: torch.Tensor,
        kept: torch.Tensor,
        correlation: torch.Tensor | None = None,
        priority: torch.Tensor | None = None,
        is_clean: torch.Tensor | None = None,
        loaded: torch.Tensor | None = None,
        scored: torch.Tensor | None = None,
        visits: torch.Tensor | None = None,
    ) -> None:
        """Add one selection of `B` candidates; all tensors are on the CPU.

        Args:
            epoch: Epoch, counted from 0.
            sample_id: Ids of the candidates, int64 `(B,)`.
            kept: Bool `(B,)`, True for a selected candidate.
            correlation: Correlations, float32 `(B,)`, NaN for a candidate that was never scored; None if the strategy
                needs no scores.
            priority: Values that the strategy ranked by, float32 `(B,)`; None, or NaN for some candidates, if it did
                not rank.
            is_clean: Bool `(B,)`, True for a matched pair; None if the truth is unknown.
            loaded: Bool `(B,)`, True for a candidate that was loaded; None without a plan.
            scored: Bool `(B,)`, True for a candidate that was scored for the selection alone; None without a plan.
            visits: Number of times that each has trained before, float32 `(B,)`; None if it is not counted.
        """
        if epoch != self.last_epoch.epoch:
            self.last_epoch = _LastEpoch(epoch)
        was_kept = kept.numpy()
        clean = None if is_clean is None else is_clean.numpy()
        scores = None if correlation is None else correlation.numpy()
        for sums in (self.run, self.last_epoch.sums, self._since_log):
            more = (None if part is None else part.numpy() for part in (loaded, scored, visits))
            sums.add(was_kept, scores, clean, *more)
        if scores is None:
            return
        if (unknown := np.isnan(scores)).any():
            known = torch.from_numpy(~unknown)
            sample_id, was_kept, scores = sample_id[known], was_kept[~unknown], scores[~unknown]
            priority = None if priority is None else priority[known]
            clean = None if clean is None else clean[~unknown]
        self._update_histogram(scores, was_kept)
        priorities = None if priority is None else priority.numpy()
        ranked = None if priorities is None else ~np.isnan(priorities)
        if priorities is None or ranked is None or not ranked.any():
            self._update_extremes(sample_id.numpy(), scores, scores, was_kept, clean)
            return
        ranking = priorities[ranked]
        clean = None if clean is None else clean[ranked]
        self._update_extremes(sample_id.numpy()[ranked], ranking, scores[ranked], was_kept[ranked], clean)
        if clean is not None:
            self.last_epoch.priorities.append(ranking)
            self.last_epoch.truths.append(clean)

    def pop_logs(self) -> dict[str, float]:
        """Return the metrics since the last call, under names that start with `selection_`."""
        return name_logs([self.pop_sums()])

    def pop_sums(self) -> dict[str, Any]:
        """Return the sums since the last call, as plain data."""
        sums, self._since_log = self._since_log, _Sums()
        return asdict(sums)

    def state_dict(self) -> dict[str, Any]:
        """Return all that was observed, as plain data and tensors."""
        last = self.last_epoch
        return {
            "run": asdict(self.run),
            "since_log": asdict(self._since_log),
            "last_epoch": {
                "epoch": last.epoch,
                "sums": asdict(last.sums),
                "best_kept": [asdict(pair) for pair in last.best_kept],
                "worst_dropped": [asdict(pair) for pair in last.worst_dropped],
            },
            "kept_counts": torch.from_numpy(last.kept_counts),
            "dropped_counts": torch.from_numpy(last.dropped_counts),
            "priorities": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *last.priorities])),
            "truths": torch.from_numpy(np.concatenate([np.zeros(0, bool), *last.truths])),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.run, self._since_log = _Sums(**state["run"]), _Sums(**state["since_log"])
        last = state["last_epoch"]
        self.last_epoch = _LastEpoch(
            last["epoch"],
            _Sums(**last["sums"]),
            state["kept_counts"].numpy(),
            state["dropped_counts"].numpy(),
            [ObservedPair(**pair) for pair in last["best_kept"]],
            [ObservedPair(**pair) for pair in last["worst_dropped"]],
            [state["priorities"].numpy()] if len(state["priorities"]) else [],
            [state["truths"].numpy()] if len(state["truths"]) else [],
        )

    def ranking_truth(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the priorities float32 `(n,)` and truths bool `(n,)` of the last epoch; None if either is unknown."""
        if not self.last_epoch.priorities:
            return None
        return np.concatenate(self.last_epoch.priorities), np.concatenate(self.last_epoch.truths)

    def score_histogram(self) -> dict[str, list[float]] | None:
        """Return a histogram of the last epoch's correlations: `edges` (n + 1), counts `kept` and `dropped` (n)."""
        last = self.last_epoch
        if not last.kept_counts.sum() + last.dropped_counts.sum():
            return None
        return {
            "edges": HISTOGRAM_EDGES.tolist(),
            "kept": last.kept_counts.tolist(),
            "dropped": last.dropped_counts.tolist(),
        }

    def _update_histogram(self, correlation: np.ndarray, kept: np.ndarray) -> None:
        correlation = correlation.clip(0, 100)  # rounding may exceed the range a little
        self.last_epoch.kept_counts += np.histogram(correlation[kept], HISTOGRAM_EDGES)[0]
        self.last_epoch.dropped_counts += np.histogram(correlation[~kept], HISTOGRAM_EDGES)[0]

    def _update_extremes(
        self,
        sample_id: np.ndarray,
        ranking: np.ndarray,
        correlation: np.ndarray,
        kept: np.ndarray,
        is_clean: np.ndarray | None,
    ) -> None:
        def pairs(positions: np.ndarray) -> list[ObservedPair]:
            return [
                ObservedPair(
                    int(sample_id[i]),
                    float(ranking[i]),
                    float(correlation[i]),
                    None if is_clean is None else bool(is_clean[i]),
                )
                for i in positions
            ]

        order = np.argsort(ranking, kind="stable")
        best, worst = pairs(order[kept[order]][::-1][:NUM_EXTREMES]), pairs(order[~kept[order]][:NUM_EXTREMES])
        self.last_epoch.add_extremes(best, worst)


def name_logs(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of the sums of all ranks (`SelectionMonitor.pop_sums`), as `selection_*`."""
    first, *others = (_Sums(**own) for own in sums)
    return {f"selection_{name}": value for name, value in first.join(others).figures().items()}


def join_monitors(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what the monitors of all ranks observed.

    Args:
        states: States of the monitors, in the order of the ranks.

    Returns:
        State of one monitor that observed all of it.
    """
    monitors = [SelectionMonitor() for _ in states]
    for monitor, state in zip(monitors, states, strict=True):
        monitor.load_state_dict(state)
    joined, others = monitors[0], monitors[1:]
    joined.run = joined.run.join([other.run for other in others])
    joined._since_log = joined._since_log.join([other._since_log for other in others])
    epoch = max(monitor.last_epoch.epoch for monitor in monitors)
    first, *rest = (monitor.last_epoch for monitor in monitors if monitor.last_epoch.epoch == epoch)
    first.sums = first.sums.join([last.sums for last in rest])
    for last in rest:
        first.kept_counts, first.dropped_counts = (
            first.kept_counts + last.kept_counts,
            first.dropped_counts + last.dropped_counts,
        )
        first.add_extremes(last.best_kept, last.worst_dropped)
        first.priorities += last.priorities
        first.truths += last.truths
    joined.last_epoch = first
    return joined.state_dict()
