"""Noise detection figures against their definitions, pair by pair."""

import math

import numpy as np
import pytest
import torch

from hf_dissect.evaluation import noise_detection_metrics

FIGURES = ("auroc", "average_precision", "recognised", "clean_share@30", "clean_share@50")


def scored_pairs(levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """200 pairs, 60 of them mismatched, whose scores overlap; rounded to `levels` values there are many ties."""
    rng = np.random.default_rng(5)
    is_clean = rng.permutation(200) >= 60
    scores = rng.normal(size=200) + is_clean
    return (scores if levels is None else np.round(scores * levels) / levels), is_clean


@pytest.mark.parametrize("levels", [None, 1, 4])
def test_auroc_is_the_share_of_ordered_couples(levels: int | None) -> None:
    scores, is_clean = scored_pairs(levels)
    couples = [(c > m) + 0.5 * (c == m) for c in scores[is_clean] for m in scores[~is_clean]]
    assert noise_detection_metrics(scores, is_clean)["auroc"] == pytest.approx(np.mean(couples))


@pytest.mark.parametrize("levels", [None, 1, 4])
def test_average_precision_adds_precision_times_gain_in_recall(levels: int | None) -> None:
    scores, is_clean = scored_pairs(levels)
    average, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores)):
        called = scores <= threshold
        recall = (called & ~is_clean).sum() / 60
        average += (recall - recall_before) * (called & ~is_clean).sum() / called.sum()
        recall_before = recall
    assert noise_detection_metrics(scores, is_clean)["average_precision"] == pytest.approx(average)


@pytest.mark.parametrize("levels", [None, 1, 4])
def test_auroc_and_average_precision_agree_with_scikit_learn(levels: int | None) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, is_clean = scored_pairs(levels)
    metrics = noise_detection_metrics(scores, is_clean)
    assert metrics["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(is_clean, scores))
    assert metrics["average_precision"] == pytest.approx(sklearn_metrics.average_precision_score(~is_clean, -scores))


def test_shares_count_the_ends_of_the_sorted_scores() -> None:
    scores, is_clean = scored_pairs(None)
    order = np.argsort(scores)
    metrics = noise_detection_metrics(scores, is_clean, shares=(0.3, 0.5, 1.0))
    assert metrics["recognised"] == pytest.approx((~is_clean[order[:60]]).mean())
    assert metrics["clean_share@30"] == pytest.approx(is_clean[order[-60:]].mean())
    assert metrics["clean_share@50"] == pytest.approx(is_clean[order[-100:]].mean())
    assert metrics["clean_share@100"] == pytest.approx(140 / 200)
    assert (metrics["num_scored"], metrics["num_mismatched"], metrics["num_unscored"]) == (200, 60, 0)


def test_ties_at_a_cut_count_by_their_average_in_any_order() -> None:
    scores, is_clean = scored_pairs(1)
    # Over many random orders of the tied, the mean share at the cut; the tolerance is five standard errors.
    rng = np.random.default_rng(0)
    orders = [np.lexsort((rng.random(200), -scores)) for _ in range(2000)]
    shares = [is_clean[order[:60]].mean() for order in orders]
    metrics = noise_detection_metrics(scores, is_clean)
    assert metrics["clean_share@30"] == pytest.approx(np.mean(shares), abs=5 * np.std(shares) / math.sqrt(2000))
    shuffled = rng.permutation(200)
    assert noise_detection_metrics(scores[shuffled], is_clean[shuffled]) == pytest.approx(metrics)


def test_constant_scores_tell_nothing() -> None:
    metrics = noise_detection_metrics(np.ones(10), np.arange(10) >= 4)
    assert metrics["auroc"] == 0.5
    assert [metrics[name] for name in FIGURES[1:]] == pytest.approx([0.4, 0.4, 0.6, 0.6])


def test_pairs_never_scored_are_left_out_and_counted() -> None:
    scores, is_clean = scored_pairs(None)
    with_gaps = np.concatenate([scores, [np.nan] * 7])
    metrics = noise_detection_metrics(torch.tensor(with_gaps), torch.tensor([*is_clean, *[True] * 7]))
    assert metrics.pop("num_unscored") == 7
    expected = noise_detection_metrics(scores, is_clean)
    assert expected.pop("num_unscored") == 0
    assert metrics == pytest.approx(expected)


def test_infinite_scores_are_ranked() -> None:
    metrics = noise_detection_metrics([math.inf, 1.0, 0.0, -math.inf], [True, True, False, False])
    assert metrics["auroc"] == metrics["average_precision"] == metrics["recognised"] == 1


@pytest.mark.parametrize("is_clean", [[True] * 3, [False] * 3, [True, True, False]])
def test_one_kind_of_scored_pairs_gives_none(is_clean: list[bool]) -> None:
    metrics = noise_detection_metrics([0.1, 0.2, math.nan], is_clean)
    assert [metrics[name] for name in FIGURES] == [None] * 5
    assert metrics["num_scored"] == 2


def test_no_pairs_give_none() -> None:
    assert [noise_detection_metrics([], [])[name] for name in FIGURES] == [None] * 5


@pytest.mark.parametrize(
    ("scores", "is_clean", "shares", "message"),
    [
        ([0.1, 0.2], [True], (0.3,), r"scores \(2,\) and is_clean \(1,\)"),
        ([[0.1]], [[True]], (0.3,), r"must both be \(num_pairs,\)"),
        ([0.1, 0.2], [0.3, 1.0], (0.3,), "must be bool"),
        ([0.1, 0.2], [0, 2], (0.3,), "must be bool"),
        ([0.1, 0.2], [True, None], (0.3,), "must be bool"),
        ([0.1, 0.2], [True, False], (30,), "shares holds 30"),
        ([0.1, 0.2], [True, False], (math.nan,), "shares holds nan"),
    ],
)
def test_bad_input_is_named(scores, is_clean, shares, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_detection_metrics(scores, is_clean, shares)
