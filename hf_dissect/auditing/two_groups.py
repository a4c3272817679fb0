"""Two-groups model of the scores of pairs: strangers, whose scores are known, and pairs that belong together."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch.special import ndtr, ndtri

from hf_dissect.auditing.scores import MatchScores

MOST_INDEPENDENT = 2000
"""Number of pairs that the likelihood counts as at most; more pairs do not make a model true."""
_TAIL = 0.025
_EDGES = torch.arange(-15, 16, dtype=torch.float64) / 5  # in deviations of the strangers
_MEANS = torch.arange(0.05, 6, 0.1, dtype=torch.float64)
_SPREADS = torch.tensor([0.6, 0.75, 0.9, 1.0, 1.1, 1.25, 1.4], dtype=torch.float64)
_SHARES = torch.linspace(0, 1, 251, dtype=torch.float64)


@dataclass(frozen=True)
class TwoGroups:
    """Estimates from the scores of `n` pairs and of strangers, see `fit_two_groups`.

    Attributes:
        share: Median of the share of mismatched pairs, in [0, 1].
        interval: Ends between which the share lies with a probability of 95 %.
        separation: Probability that a pair that belongs together scores above a stranger: an AUROC that needs no
            truth, only `share`. 0.5 means that the scores know nothing.
        p_mismatched: Probabilities of the pairs to be mismatched, float64 `(n,)`, never rising with the score.
        local_fdr: Local false discovery rates, float64 `(n,)`, see `estimate_local_fdr`.
    """

    share: float
    interval: tuple[float, float]
    separation: float
    p_mismatched: np.ndarray
    local_fdr: np.ndarray


def fit_two_groups(scores: MatchScores) -> TwoGroups:
    """Fit the two-groups model to scores.

    A pair is mismatched with a probability `share`, and its score is then that of a stranger. Scores are ranked among
    those of strangers, and the ranks turned into normal deviates: strangers are then standard normal by construction,
    and pairs that belong together are taken as normal with another mean and spread (the binormal model of ROC
    curves). Share, mean and spread are integrated over a grid, with flat priors.

    The likelihood counts as that of at most `MOST_INDEPENDENT` pairs. A posterior tempered in this way (Miller and
    Dunson, arXiv 1506.06101) holds for data that follow the model only approximately.
    """
    score, chance = scores.score.double(), scores.chance.double().sort().values
    edges = torch.from_numpy(np.quantile(chance.numpy(), ndtr(_EDGES).numpy()))
    observed = _count(score, edges)
    posterior = _Posterior(_count(chance, edges) / len(chance), observed * min(1.0, MOST_INDEPENDENT / len(score)))
    share = posterior.find_quantile(0.5)
    rank = torch.searchsorted(chance, score, right=True).double()
    deviate = ndtri((rank + 0.5) / (len(chance) + 1))
    return TwoGroups(
        share=share,
        interval=(posterior.find_quantile(_TAIL), posterior.find_quantile(1 - _TAIL)),
        separation=_estimate_separation(score.numpy(), chance.numpy(), posterior.mean_share),
        p_mismatched=make_falling(posterior.compute_p_mismatched(deviate).numpy(), score.numpy()),
        local_fdr=estimate_local_fdr(score.numpy(), chance.numpy(), share),
    )


class _Posterior:
    """Posterior of share, mean and spread on a grid.

    Args:
        null: Probabilities of strangers to be in each bin, float64 `(bins,)`.
        counts: Numbers of pairs in each bin, likewise.
    """

    def __init__(self, null: torch.Tensor, counts: torch.Tensor) -> None:
        mean, spread = (grid.flatten() for grid in torch.meshgrid(_MEANS, _SPREADS, indexing="ij"))
        # Where strangers have ties, the ends of the bins are not those that were asked for.
        edges = ndtri(null.cumsum(0)[:-1].clamp(0, 1))
        below = ndtr((edges - mean[:, None]) / spread[:, None])
        ends = torch.zeros(len(mean), 1, dtype=torch.float64), torch.ones(len(mean), 1, dtype=torch.float64)
        matched = torch.cat([ends[0], below, ends[1]], 1).diff(dim=1)
        # Counts where the fit has no probability must not decide alone: a floor, as for every table of counts.
        matched, null = matched.clamp_min(1e-9), null.clamp_min(1e-9)
        likelihood = torch.empty(len(_SHARES), len(mean), dtype=torch.float64)
        for place, share in enumerate(_SHARES):
            likelihood[place] = (share * null + (1 - share) * matched).log() @ counts
        weight = (likelihood - likelihood.max()).exp()
        self._weight = weight / weight.sum()
        self._mean, self._spread = mean, spread

    def find_quantile(self, level: float) -> float:
        """Return a quantile of the share."""
        reached = self._weight.sum(1).cumsum(0)
        return float(_SHARES[min(int(torch.searchsorted(reached, level)), len(_SHARES) - 1)])

    @property
    def mean_share(self) -> float:
        """Mean of the share."""
        return float((self._weight.sum(1) * _SHARES).sum())

    def compute_p_mismatched(self, deviate: torch.Tensor) -> torch.Tensor:
        """Return the probability to be mismatched at each deviate, at the mean of the posterior."""
        share = torch.tensor(self.mean_share, dtype=torch.float64)
        mean, spread = ((self._weight.sum(0) * values).sum() for values in (self._mean, self._spread))
        evidence = ((deviate - mean) / spread).square() / 2 + spread.log() - deviate.square() / 2
        return torch.sigmoid((share / (1 - share)).log() + evidence)


def _estimate_separation(score: np.ndarray, chance: np.ndarray, share: float) -> float:
    """Return the AUROC of pairs that belong together against strangers, from that of all pairs.

    The latter is a mean: mismatched pairs, `share` of all, have an AUROC of 1/2 against strangers.
    """
    below = (np.searchsorted(chance, score, "left") + np.searchsorted(chance, score, "right")) / 2
    auroc = float(below.mean()) / len(chance)
    return min(1.0, max(0.5, 0.5 + (auroc - 0.5) / max(1 - share, 1e-3)))


def estimate_local_fdr(score: np.ndarray, chance: np.ndarray, share: float) -> np.ndarray:
    """Estimate the local false discovery rate of each pair (Efron, Tibshirani, Storey, Tusher 2001).

    It is `share` times the density of strangers at the score, over that of all pairs. The ratio of the densities is an
    isotonic regression, which assumes no more than that it falls with the score.

    Args:
        score: Scores of the pairs, float64 `(n,)`.
        chance: Scores of strangers, float64 `(m,)`.
        share: Share of mismatched pairs.

    Returns:
        Rates in [0, 1], float64 `(n,)`, never rising with the score.
    """
    values, place = np.unique(np.concatenate([score, chance]), return_inverse=True)
    strangers = np.bincount(place[len(score) :], minlength=len(values)) / len(chance)
    pairs = np.bincount(place[: len(score)], minlength=len(values)) / len(score)
    both = strangers + pairs
    fraction = isotonic_regression(strangers / both, sample_weight=both, increasing=False)
    ratio = fraction / np.maximum(1 - fraction, 1e-12)
    return np.minimum(1.0, share * ratio)[place[: len(score)]]


def find_largest_set(local_fdr: np.ndarray, score: np.ndarray, max_fdr: float) -> np.ndarray:
    """Return a mask of the most pairs of which, on average, at most `max_fdr` are mismatched, bool `(n,)`.

    They are the pairs with the highest scores; pairs of one score are all kept or all left out.
    """
    order = np.argsort(-score, kind="stable")
    expected = np.cumsum(local_fdr[order]) / np.arange(1, len(order) + 1)
    ordered = score[order]
    is_last_of_score = np.append(ordered[1:] != ordered[:-1], True)
    (ends,) = np.nonzero((expected <= max_fdr) & is_last_of_score)
    kept = np.zeros(len(order), bool)
    if len(ends):
        kept[order[: ends[-1] + 1]] = True
    return kept


def make_falling(probability: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Make a probability never rise with the score: of two groups of unequal spread, the wider one has both tails."""
    order = np.argsort(score)
    values = probability[order]
    # Begin where likely mismatched and likely matched pairs are separated best, and move outwards.
    wrong = np.concatenate([[0], np.cumsum(values < 0.5)]) + np.concatenate(
        [np.cumsum((values >= 0.5)[::-1])[::-1], [0]]
    )
    place = int(wrong.argmin())
    values[:place] = np.maximum.accumulate(values[:place][::-1])[::-1]
    values[place:] = np.minimum.accumulate(values[place:])
    falling = np.empty_like(values)
    falling[order] = values
    return falling


def _count(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    return torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1).double()
