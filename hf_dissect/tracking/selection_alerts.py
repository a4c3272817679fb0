"""Signs that a selection does not do what it is for: it prefers the wrong pairs, or its estimate has left its past."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.losses.noisy_channel import NoisyChannel
from hf_dissect.report.plots import series
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.tracking.alerts import Alert

RULES_BY_MATCH = ("small_loss", "clipscore", "ncr", "gsc", "scan", "noisy_channel")
"""Rules that keep the pairs that match best by the present model, so that kept pairs must correlate more."""
RULES_BY_FALL = ("dissect",)
"""Rules whose kept pairs correlate less at first, and more once the model has learnt the matched pairs."""
STANDARD_ERRORS = 5.0
LEAST_PAIRS = 100
MEMORY = 200
"""Optimiser steps after which the estimate of matched pairs has forgotten where it began: `0.98 ** 200` is 1.8 %."""
LARGEST_CHANGE = 0.15
LEAST_LOGS = 5
_EARLY, _HALF = 0.1, 0.5


def find_wrong_preference(strategy: str, monitor: SelectionMonitor, progress: float) -> list[Alert]:
    """Return an alert if a rule prefers the pairs that it should drop, by more than chance.

    Where the truth is known, it decides: in the second half of a run, the ranking must not have an AUROC below 0.5.
    Elsewhere kept pairs must not correlate less than dropped ones, for rules that rank by the match (after a tenth of
    the steps) and for `dissect` (in the second half). Other rules look for hard or diverse pairs on purpose.

    Args:
        strategy: Name of the rule.
        monitor: Monitor of its selections.
        progress: Share of the steps that is done.
    """
    if (ranking := monitor.ranking_truth()) is not None:
        return _judge_ranking(*ranking) if progress >= _HALF else []
    least = _EARLY if strategy in RULES_BY_MATCH else _HALF if strategy in RULES_BY_FALL else math.inf
    histogram = monitor.score_histogram()
    return _judge_correlations(histogram) if histogram is not None and progress >= least else []


def _judge_ranking(priority: np.ndarray, is_clean: np.ndarray) -> list[Alert]:
    matched, mismatched = int(is_clean.sum()), int((~is_clean).sum())
    if min(matched, mismatched) < LEAST_PAIRS // 2:
        return []
    auroc = noise_detection_metrics(priority, is_clean)["auroc"]
    # Standard deviation of the statistic of Mann and Whitney if the ranking knew nothing.
    deviation = math.sqrt((matched + mismatched + 1) / (12 * matched * mismatched))
    if auroc is None or auroc >= 0.5 - STANDARD_ERRORS * deviation:
        return []
    text = (
        f"In this epoch the rule ranks mismatched pairs above matched ones (AUROC {auroc:.3f}, where 0.5 is chance). "
        "Look at the best kept pairs, and choose another selection.strategy."
    )
    return [Alert("preference", "The rule prefers mismatched pairs", text)]


def _judge_correlations(histogram: Mapping[str, Sequence[float]]) -> list[Alert]:
    edges = np.asarray(histogram["edges"])
    middles = (edges[:-1] + edges[1:]) / 2
    moments = []
    for name in ("kept", "dropped"):
        counts = np.asarray(histogram[name], dtype=np.float64)
        if (total := counts.sum()) < LEAST_PAIRS:
            return []
        mean = float(counts @ middles / total)
        moments.append((mean, float(counts @ (middles - mean) ** 2 / total), total))
    (kept, kept_variance, num_kept), (dropped, dropped_variance, num_dropped) = moments
    # The bins alone blur each score by a variance of a twelfth of their width squared.
    blur = float(edges[1] - edges[0]) ** 2 / 12
    deviation = math.sqrt((kept_variance + blur) / num_kept + (dropped_variance + blur) / num_dropped)
    if kept >= dropped - STANDARD_ERRORS * deviation:
        return []
    text = (
        f"In this epoch the kept pairs correlate less (mean {kept:.1f}) than the dropped ones ({dropped:.1f}). Look "
        "at the best kept and the worst dropped pairs, and choose another selection.strategy if they are swapped."
    )
    return [Alert("preference", "The rule prefers pairs that it should drop", text)]


def find_strange_estimate(log_history: Sequence[Mapping[str, Any]]) -> list[Alert]:
    """Return an alert if the estimated share of matched pairs, `pi`, is where an estimate cannot be right.

    It is at a bound of `NoisyChannel`, or it has left the range of its own past, of the logs at least `MEMORY` steps
    ago, by more than `LARGEST_CHANGE`. The first `MEMORY` steps count for nothing, since `pi` starts at 1/2.
    """
    steps, mismatched = series(log_history, "selection_estimated_mismatched")
    if not steps or steps[-1] < MEMORY:
        return []
    pi, advice = 1 - mismatched[-1], "Look at the curve of the estimate and at the loss; do not trust the weights."
    if not NoisyChannel.LOWEST + 1e-4 < pi < NoisyChannel.HIGHEST - 1e-4:
        bounds = f"[{NoisyChannel.LOWEST}, {NoisyChannel.HIGHEST}]"
        right = "every caption is right" if pi > 0.5 else "next to no caption is right"
        text = (
            f"The estimated share of matched pairs, pi, is {pi:.3f}, at the end of its range {bounds}, which is true "
        )
        text += f"only if {right}. {advice}"
        return [Alert("estimate", "pi is at its bound", text)]
    past = [1 - value for step, value in zip(steps, mismatched, strict=True) if MEMORY <= step <= steps[-1] - MEMORY]
    if len(past) < LEAST_LOGS or min(past) - LARGEST_CHANGE <= pi <= max(past) + LARGEST_CHANGE:
        return []
    text = (
        f"The estimated share of matched pairs, pi, is {pi:.3f}; until {MEMORY} steps ago it was {min(past):.3f} to "
        f"{max(past):.3f}. {advice}"
    )
    return [Alert("estimate", "pi has left its past", text)]
