"""The two-groups model on scores whose truth is known: good and useless models, few and many mismatched pairs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from testing.made_embeddings import make_embeddings_of_pairs

from hf_dissect.auditing.scores import MatchScores, score_matches
from hf_dissect.auditing.two_groups import estimate_local_fdr, find_largest_set, fit_two_groups


def draw(count: int, auroc: float, share: float, seed: int = 0) -> tuple[MatchScores, np.ndarray]:
    """Draw scores of pairs and strangers with a given AUROC between them, and which pairs belong together."""
    rng = np.random.default_rng(seed)
    is_clean = np.arange(count) >= round(share * count)
    distance = torch.special.ndtri(torch.tensor(auroc, dtype=torch.float64)).item() * 2**0.5
    score = rng.normal(size=count) + distance * is_clean
    # Any rising function of all scores is as good.
    scale = lambda values: torch.from_numpy(np.exp(values) * 3 - 7)  # noqa: E731
    return MatchScores(scale(score), scale(rng.normal(size=16 * count))), is_clean


SHARES = (0.0, 0.05, 0.15, 0.4, 0.8)
# Largest errors with eight seeds, and a fifth to a half more. Few pairs that belong together (a share of 0.8) leave
# the shape of their scores open, and scores that overlap (an AUROC of 0.85) leave the share open.
SHARE_ERRORS = {0.85: (0.03, 0.03, 0.08, 0.12, 0.18), 0.95: (0.02, 0.03, 0.04, 0.04, 0.08)}
SHARE_ERRORS[0.995] = (0.005, 0.01, 0.02, 0.015, 0.015)
SEPARATION_ERRORS = {0.85: (0.02, 0.02, 0.05, 0.1, 0.18), 0.95: (0.01, 0.015, 0.02, 0.02, 0.12)}
SEPARATION_ERRORS[0.995] = (0.003, 0.005, 0.01, 0.015, 0.07)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("auroc", [0.85, 0.95, 0.995])
def test_share_interval_and_separation_are_those_of_the_truth(auroc, share, seed):
    matches, is_clean = draw(3000, auroc, share, seed)
    groups = fit_two_groups(matches)
    low, high = groups.interval
    assert low - 0.01 <= share <= high + 0.01 and low <= groups.share <= high
    assert groups.share == pytest.approx(share, abs=SHARE_ERRORS[auroc][SHARES.index(share)])
    assert groups.separation == pytest.approx(auroc, abs=SEPARATION_ERRORS[auroc][SHARES.index(share)])
    assert groups.p_mismatched.mean() == pytest.approx(groups.share, abs=0.1 if auroc < 0.9 else 0.01)
    order = matches.score.numpy().argsort()
    assert (np.diff(groups.p_mismatched[order]) <= 0).all() and (np.diff(groups.local_fdr[order]) <= 0).all()
    assert roc_auc_score(is_clean, -groups.p_mismatched) > auroc - 0.025 if 0 < share else True


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("auroc", "share"), [(0.68, 0.15), (0.68, 0.0), (0.6, 0.4), (0.75, 0.6)])
@pytest.mark.parametrize("count", [300, 3000])
def test_a_model_that_knows_little_says_so(count, auroc, share, seed):
    groups = fit_two_groups(draw(count, auroc, share, seed)[0])
    low, high = groups.interval
    # A bound that lies at 0 misses it by up to 0.024 with 300 pairs.
    assert low - (0.03 if count == 300 else 0.01) <= share <= high
    assert high - low > (0.3 if count == 300 else 0.25 if share else 0.1)
    assert groups.separation < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_pairs_that_are_all_strangers_cannot_be_called_clean(seed):
    groups = fit_two_groups(draw(1000, 0.9, 1.0, seed)[0])
    # With eight seeds: a share of 0.91 to 0.99, an interval up to 1, a separation of 0.5 to 0.61.
    assert groups.interval[1] > 0.99 and groups.share > 0.87 and groups.separation < 0.7


def test_scores_of_embeddings_with_and_without_ties():
    image, text, is_clean = make_embeddings_of_pairs(2000, 0.3)
    groups = fit_two_groups(score_matches(image, text, logit_scale=10.0))
    assert groups.share == pytest.approx(0.3, abs=0.015)
    assert ((groups.p_mismatched > 0.5) == ~is_clean.numpy()).mean() > 0.99
    flat = fit_two_groups(MatchScores(torch.zeros(50), torch.zeros(400)))
    assert np.isfinite(flat.p_mismatched).all() and flat.separation < 0.8


@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("max_fdr", [0.02, 0.05, 0.2])
def test_the_largest_set_holds_its_promise(share, max_fdr):
    matches, is_clean = draw(20_000, 0.95, share)
    groups = fit_two_groups(matches)
    kept = find_largest_set(groups.local_fdr, matches.score.numpy(), max_fdr)
    # With six seeds, the largest error is 0.005 up to 0.05, and 0.019 at 0.2, where one pair more weighs more.
    assert (~is_clean[kept]).mean() == pytest.approx(min(max_fdr, share), abs=0.025 if max_fdr > 0.05 else 0.007)
    assert groups.local_fdr[kept].mean() <= max_fdr
    # They are the best ones, and with the next there would be too many mismatched.
    score = matches.score.numpy()
    assert score[kept].min() > score[~kept].max()
    if (~kept).sum() < 200:
        return
    following = score >= np.sort(score[~kept])[-200]
    assert groups.local_fdr[following].mean() > max_fdr


def test_local_fdr_is_the_ratio_of_densities():
    # Strangers: half at 0, half at 1. Pairs: a quarter at 0, three quarters at 1.
    score, chance = np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(estimate_local_fdr(score, chance, 0.3), [0.3 * 2, *[0.3 * 2 / 3] * 3])
    # A ratio that would rise is the mean of both; a pair above all strangers is not mismatched.
    np.testing.assert_allclose(estimate_local_fdr(1 - score, chance, 0.3), [0.3] * 4)
    np.testing.assert_allclose(estimate_local_fdr(np.array([5.0, 0.0]), chance, 0.3)[0], 0, atol=1e-9)


def test_pairs_of_one_score_stay_together():
    fdr, score = np.array([0.0, 0.1, 0.1, 0.9]), np.array([3.0, 2.0, 2.0, 1.0])
    assert find_largest_set(fdr, score, 0.06).tolist() == [True, False, False, False]
    assert find_largest_set(fdr, score, 0.07).tolist() == [True, True, True, False]
    assert not find_largest_set(fdr + 0.2, score, 0.1).any()
