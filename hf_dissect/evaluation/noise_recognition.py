"""Metrics of how well a score separates matched from mismatched pairs, for data with known truth."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def noise_detection_metrics(
    scores: Tensor | np.ndarray | Sequence[float],
    is_clean: Tensor | np.ndarray | Sequence[bool],
    shares: Sequence[float] = (0.3, 0.5),
) -> dict[str, float | int | None]:
    """Measure how well scores separate clean pairs from mismatched ones.

    Pairs whose scores tie at a cut count by their average, so that the order of the pairs does not matter.

    Args:
        scores: Scores `(num_pairs,)`, higher for a pair that is more likely clean. NaN marks a pair that was never
            scored, which every metric leaves out. Infinite scores are ranked like others.
        is_clean: Bool `(num_pairs,)`, True if the caption belongs to the image.
        shares: Shares of the highest-scored pairs to examine, each above 0 and at most 1.

    Returns:
        A dict with these entries. All of them but the counts are None if only one kind of pair was scored.

        - `auroc`: probability that a clean pair scores above a mismatched one; a tie counts half.
        - `average_precision`: average precision of finding the mismatched pairs among the lowest-scored.
        - `recognised`: share of mismatched pairs among the n lowest-scored, where n is the number of mismatched pairs.
        - `clean_share@30`, `clean_share@50`: share of clean pairs among the 30 % and 50 % highest-scored, as plotted
          in DISSect (arXiv 2507.12998).
        - `num_scored`, `num_mismatched` (of the scored) and `num_unscored`: counts of pairs.

    Raises:
        ValueError: If the lengths differ, the truth is not bool, or a share is out of range.
    """
    all_scores, all_clean = _check_pairs(scores, is_clean)
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"shares holds {share!r}, but a share must be above 0 and at most 1, such as 0.3.")
    scored = ~np.isnan(all_scores)
    values, clean = all_scores[scored], all_clean[scored]
    num_scored, num_mismatched = len(values), int((~clean).sum())

    names = ["auroc", "average_precision", "recognised", *(f"clean_share@{100 * share:g}" for share in shares)]
    if 0 < num_mismatched < num_scored:
        kept = [max(1, round(share * num_scored)) for share in shares]
        results: list[float | None] = [
            _auroc(values, clean),
            _average_precision(-values, ~clean),
            _share_among_highest(-values, ~clean, num_mismatched),
            *(_share_among_highest(values, clean, k) for k in kept),
        ]
    else:
        results = [None] * len(names)
    counts = {"num_scored": num_scored, "num_mismatched": num_mismatched, "num_unscored": int((~scored).sum())}
    return {**dict(zip(names, results, strict=True)), **counts}


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Compute the Mann-Whitney statistic, the mean rank of the positives shifted and scaled; ties share a rank."""
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    num_positive = positive.sum()
    rank_sum = mean_rank[group][positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * (~positive).sum()))


def _positives_from_highest(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the pairs, and the positives among them, down to each distinct score, from the highest on."""
    _, group = np.unique(-scores, return_inverse=True)
    return np.cumsum(np.bincount(group)), np.cumsum(np.bincount(group, weights=positive))


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    taken, found = _positives_from_highest(scores, positive)
    return float((np.diff(found, prepend=0) * found / taken).sum() / found[-1])


def _share_among_highest(scores: np.ndarray, positive: np.ndarray, k: int) -> float:
    """Compute the share of positives among the `k` highest; a group of ties cut by `k` counts in proportion."""
    taken, found = _positives_from_highest(scores, positive)
    return float(np.interp(k, np.concatenate([[0], taken]), np.concatenate([[0], found])) / k)


def _check_pairs(
    scores: Tensor | np.ndarray | Sequence[float], is_clean: Tensor | np.ndarray | Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    values = scores.detach().double().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores, np.float64)
    clean = is_clean.detach().cpu().numpy() if isinstance(is_clean, Tensor) else np.asarray(is_clean)
    if values.ndim != 1 or values.shape != clean.shape:
        raise ValueError(f"scores {values.shape} and is_clean {clean.shape} must both be (num_pairs,).")
    if clean.size == 0:
        clean = clean.astype(bool)
    if clean.dtype != bool and not (clean.dtype.kind in "iu" and np.isin(clean, (0, 1)).all()):
        raise ValueError(
            f"is_clean has dtype {clean.dtype}, but must be bool (or 0 and 1): True where the caption belongs to "
            "the image. Leave out pairs whose truth is unknown."
        )
    return values, clean.astype(bool)
