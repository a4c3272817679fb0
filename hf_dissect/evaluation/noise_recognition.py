"""Measures how well a score tells matched from mismatched pairs, where the truth is known."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def noise_detection_metrics(
    scores: Tensor | np.ndarray | Sequence[float],
    is_clean: Tensor | np.ndarray | Sequence[bool],
    shares: Sequence[float] = (0.3, 0.5),
) -> dict[str, float | int | None]:
    """How well `scores` separate clean pairs from mismatched ones.

    Args:
        scores: `(num_pairs,)`, higher for a pair that is more likely clean; NaN for a pair that was never scored,
            which is left out of every figure. Infinite scores are ranked like others.
        is_clean: `(num_pairs,)` bool, True where the caption truly belongs to the image.
        shares: The highest-scored shares of the pairs to look into, each above 0 and at most 1.

    Returns:
        `auroc`: probability that a clean pair scores above a mismatched one, a tie counting half.
        `average_precision`: of finding the mismatched among the lowest-scored; the area under precision over recall.
        `recognised`: share of mismatched pairs among the n lowest-scored, n being the number of mismatched pairs.
        `clean_share@30`, `clean_share@50`: share of clean pairs among the 30 % and 50 % highest-scored, as
        plotted in DISSect (arXiv 2507.12998).
        `num_scored`, `num_mismatched` (of the scored) and `num_unscored`: counts of pairs.
        Pairs whose scores tie at a cut count by their average, so the order of the pairs never matters. All figures
        but the counts are None where only one kind of pair was scored: there is nothing to tell apart.

    Raises:
        ValueError: On lengths that differ, a truth that is not bool, or an impossible share.
    """
    scores, is_clean = _checked_pairs(scores, is_clean)
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"shares holds {share!r}, but a share must be above 0 and at most 1, such as 0.3.")
    scored = ~np.isnan(scores)
    scores, is_clean = scores[scored], is_clean[scored]
    num_scored, num_mismatched = len(scores), int((~is_clean).sum())

    names = ["auroc", "average_precision", "recognised", *(f"clean_share@{100 * share:g}" for share in shares)]
    if 0 < num_mismatched < num_scored:
        kept = [max(1, round(share * num_scored)) for share in shares]
        values = [
            _auroc(scores, is_clean),
            _average_precision(-scores, ~is_clean),
            _share_among_highest(-scores, ~is_clean, num_mismatched),
            *(_share_among_highest(scores, is_clean, k) for k in kept),
        ]
    else:
        values = [None] * len(names)
    counts = {"num_scored": num_scored, "num_mismatched": num_mismatched, "num_unscored": int((~scored).sum())}
    return dict(zip(names, values, strict=True)) | counts


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mann-Whitney: the mean rank of the positives, shifted and scaled; tied scores share their mean rank."""
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    num_positive = positive.sum()
    rank_sum = mean_rank[group][positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * (~positive).sum()))


def _positives_from_highest(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs, and positives among them, down to and with each distinct score, from the highest on."""
    _, group = np.unique(-scores, return_inverse=True)
    return np.cumsum(np.bincount(group)), np.cumsum(np.bincount(group, weights=positive))


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    taken, found = _positives_from_highest(scores, positive)
    return float((np.diff(found, prepend=0) * found / taken).sum() / found[-1])


def _share_among_highest(scores: np.ndarray, positive: np.ndarray, k: int) -> float:
    """Share of positives among the `k` highest; a group of equal scores that `k` cuts through counts in proportion."""
    taken, found = _positives_from_highest(scores, positive)
    return float(np.interp(k, np.concatenate([[0], taken]), np.concatenate([[0], found])) / k)


def _checked_pairs(
    scores: Tensor | np.ndarray | Sequence[float], is_clean: Tensor | np.ndarray | Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    scores = scores.detach().double().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores, np.float64)
    is_clean = is_clean.detach().cpu().numpy() if isinstance(is_clean, Tensor) else np.asarray(is_clean)
    if scores.ndim != 1 or scores.shape != is_clean.shape:
        raise ValueError(f"scores {scores.shape} and is_clean {is_clean.shape} must both be (num_pairs,).")
    if is_clean.size == 0:
        is_clean = is_clean.astype(bool)
    if is_clean.dtype != bool and not (is_clean.dtype.kind in "iu" and np.isin(is_clean, (0, 1)).all()):
        raise ValueError(
            f"is_clean has dtype {is_clean.dtype}, but must be bool (or 0 and 1): True where the caption belongs to "
            "the image. Leave out pairs whose truth is unknown."
        )
    return scores, is_clean.astype(bool)
