"""Estimates of the information between features and between features and labels, in nats, on held-out rows.

Each estimate fits something on training rows and is evaluated on rows that had no part in the fit. Nothing is
clipped: an estimate may be negative, which means that the fit misleads about the held-out rows. With too few rows an
estimate is None, which stands for "not known".
"""

import copy
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

FEWEST_ROWS = 10
"""Number of rows below which nothing is estimated: of the rows that fit, and of those held out."""
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strengths of the L2 penalty
_SCALES = np.geomspace(0.05, 2.0, 12)  # factors of the logits
_PRIOR_SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_WIDEST = 128  # features beyond which a head sees principal components
_DIMENSIONS = (4, 8, 16, 32, 64)
_POWERS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.0)  # of a density ratio
_LARGEST_CORRELATION = 0.9999
_FARTHEST = 4.0  # deviations at which a canonical variate is cut


@dataclass(frozen=True)
class InformationBound:
    """Lower bound of the mutual information.

    Attributes:
        nats: The bound.
        cap: Largest number that the bound can reach, `log N` for `N` held-out rows.
    """

    nats: float
    cap: float


def bound_information(
    x: torch.Tensor, y: torch.Tensor, held_out_x: torch.Tensor, held_out_y: torch.Tensor, *, steps: int = 200
) -> InformationBound | None:
    """Compute the InfoNCE lower bound of I(X;Y), `log N - L_NCE` (arXiv 1807.03748, section 2.3).

    Two projections with a hidden layer are trained on the rows of `x` and `y`, a fifth of which chooses the step at
    which to stop. The bound is that of the held-out rows, with all of them as candidates, the mean over both
    directions. Networks that know the training rows by heart make the projections too sure of themselves; hence the
    temperature is chosen on one half of the held-out rows for the other half, and the other way round.

    Args:
        x: Features of the training rows, `(n, D_x)`.
        y: Features of the training rows, `(n, D_y)`.
        held_out_x: Features of the held-out rows, `(N, D_x)`.
        held_out_y: Features of the held-out rows, `(N, D_y)`.
        steps: Number of steps of the optimiser.

    Returns:
        The bound and its cap; None with fewer than `FEWEST_ROWS` rows of either kind.
    """
    if min(len(x), len(held_out_x)) < FEWEST_ROWS:
        return None
    (x, held_out_x), (y, held_out_y) = _standardise(x, held_out_x), _standardise(y, held_out_y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    stops, fits = order[: max(2, len(x) // 5)], order[max(2, len(x) // 5) :]
    critic = _Critic(x.shape[1], y.shape[1])
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, weight_decay=1e-2)
    best, kept = math.inf, critic
    with torch.enable_grad():
        for step in range(steps):
            rows = fits[torch.randperm(len(fits), generator=generator)[:256]]
            optimizer.zero_grad()
            critic(x[rows], y[rows]).mean().backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    loss = min(float(critic(x[stops], y[stops], power).mean()) for power in _POWERS)
                if loss < best:
                    best, kept = loss, copy.deepcopy(critic)
    cap = math.log(len(held_out_x))
    with torch.no_grad():
        losses = [kept(held_out_x, held_out_y, power) for power in _POWERS]
    parts = [
        min(losses, key=lambda loss: float(loss[fits].mean()))[tested] for fits, tested in _halve(len(held_out_x))
    ]
    return InformationBound(cap - float(torch.cat(parts).mean()), cap)


def estimate_information(
    x: torch.Tensor, y: torch.Tensor, held_out_x: torch.Tensor, held_out_y: torch.Tensor
) -> float | None:
    """Estimate I(X;Y) without the cap of `log N`, by the density ratio of a regularised Gaussian.

    Principal components of x and y are turned into canonical variates on the training rows. Their correlations are
    measured on one half of the held-out rows, where weak ones count as 0, and the estimate is that of the other half;
    it is the mean over both exchanges. The ratio `q(x,y) / (q(x) q(y))`, or a power of it that is chosen with the
    correlations, serves as critic of the Donsker-Varadhan bound `E[log r] - log E'[r]` (see arXiv 1910.06222, section
    2), E' being the mean over all pairs of different rows, or that of the Gaussian where it is larger: a few rows
    seldom hold the rare pairs that make up E'. The bound keeps features in clusters, which are not Gaussian, from
    counting as more than they are.

    It sees linear dependence only, so that it may be below I(X;Y). Beyond `log N` it rests on the Gaussian tails, and
    does not hold with high probability: no bound that does can exceed `log N`.

    Args:
        x: Features of the training rows, `(n, D_x)`.
        y: Features of the training rows, `(n, D_y)`.
        held_out_x: Features of the held-out rows, `(N, D_x)`.
        held_out_y: Features of the held-out rows, `(N, D_y)`.

    Returns:
        The estimate in nats; None with fewer than `2 * FEWEST_ROWS` training rows or `FEWEST_ROWS` held-out rows.
    """
    if len(x) < 2 * FEWEST_ROWS or len(held_out_x) < FEWEST_ROWS:
        return None
    (x, held_out_x), (y, held_out_y) = _standardise(x, held_out_x), _standardise(y, held_out_y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fits, measures = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    best, chosen = -math.inf, _DIMENSIONS[0]
    components = _find_components(x[fits]), _find_components(y[fits])
    for size in _DIMENSIONS:
        directions = _find_directions(x[fits], y[fits], components, size)
        ratio = _GaussianRatio(directions, x[measures], y[measures])
        score = max(ratio.compute_information(x[measures], y[measures]))
        if score > best:
            best, chosen = score, size
        if size > len(fits) // 4:
            break
    directions, estimates = _find_directions(x, y, (_find_components(x), _find_components(y)), chosen), []
    for fits, tested in _halve(len(held_out_x)):
        ratio = _GaussianRatio(directions, held_out_x[fits], held_out_y[fits])
        scores = ratio.compute_information(held_out_x[fits], held_out_y[fits])
        estimates.append(ratio.compute_information(held_out_x[tested], held_out_y[tested])[np.argmax(scores)])
    return sum(estimates) / 2


def estimate_cross_entropy(
    features: torch.Tensor, labels: torch.Tensor, held_out_features: torch.Tensor, held_out_labels: torch.Tensor
) -> float | None:
    """Estimate the cross-entropy of the labels given features, by a multinomial logistic regression.

    Features of more than 128 dimensions are cut to their first principal components. The L2 penalty is chosen on a
    fifth of the training rows. A network has often learnt the training rows by heart,
    which makes a head too sure of itself; hence a factor of the logits and a share of the class frequencies are fitted
    on one half of the held-out rows for the other half, and the other way round.

    Args:
        features: Features of the labelled training rows, `(n, D)`.
        labels: Their classes, int64 `(n,)`.
        held_out_features: Features of the labelled held-out rows, `(N, D)`, all of classes that are among `labels`.
        held_out_labels: Their classes, int64 `(N,)`.

    Returns:
        The cross-entropy in nats, an upper bound of the conditional entropy H(Y|X) in expectation; None with fewer
        than `FEWEST_ROWS` rows of either kind or a single class.
    """
    classes, numbers = np.unique(labels.numpy(), return_inverse=True)
    if min(len(labels), len(held_out_labels)) < FEWEST_ROWS or len(classes) < 2:
        return None
    own, held_out = (part.double().numpy() for part in _reduce(*_standardise(features, held_out_features)))
    true = np.searchsorted(classes, held_out_labels.numpy())
    logits = _fit_head(own, numbers, _choose_strength(own, numbers)).predict_log_proba(held_out)
    prior = np.log((np.bincount(numbers) + 1) / (len(numbers) + len(classes)))
    candidates = [_temper(logits, prior, scale, share) for scale in _SCALES for share in _PRIOR_SHARES]
    losses = [torch.from_numpy(-part[np.arange(len(true)), true]) for part in candidates]
    parts = [min(losses, key=lambda loss: float(loss[fits].mean()))[tested] for fits, tested in _halve(len(true))]
    return float(torch.cat(parts).mean())


def compute_entropy(labels: torch.Tensor) -> float | None:
    """Compute the entropy H(Y) of the frequencies of labels, int64 `(n,)`; None without labels."""
    if len(labels) == 0:
        return None
    shares = torch.unique(labels, return_counts=True)[1].double() / len(labels)
    return float(-(shares * shares.log()).sum())


def _standardise(own: torch.Tensor, held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring features to zero mean and unit deviation over the training rows; constant ones become 0."""
    own, held_out = own.double(), held_out.double()
    mean, deviation = own.mean(0), own.std(0)
    varies = deviation > 1e-6 * (1 + mean.abs())
    scale = torch.where(varies, 1 / deviation.clamp_min(1e-12), 0)
    return ((own - mean) * scale).float(), ((held_out - mean) * scale).float()


def _halve(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return two halves of the rows at random, once in this order and once exchanged."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [(order[::2], order[1::2]), (order[1::2], order[::2])]


class _Critic(nn.Module):
    """Two projections to vectors of unit length, whose cosines are multiplied by a learnt scale.

    Args:
        x_size: Size of the x.
        y_size: Size of the y.
        size: Size of the vectors.
    """

    def __init__(self, x_size: int, y_size: int, size: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the accelerators as well
            self.x, self.y = (
                nn.Sequential(nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
                for width in (x_size, y_size)
            )
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x: torch.Tensor, y: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        """Compute `L_NCE` of each of `n` rows, with all rows as candidates, the mean over both directions."""
        u, v = F.normalize(self.x(x), dim=-1), F.normalize(self.y(y), dim=-1)
        logits, true = u @ v.T * self.scale.exp() * power, torch.arange(len(x))
        losses = [F.cross_entropy(part, true, reduction="none") for part in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2


def _find_directions(
    x: torch.Tensor, y: torch.Tensor, components: tuple[torch.Tensor, torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the directions of the canonical variates of x `(n, D_x)` and y `(n, D_y)`, the most correlated first.

    Args:
        x: Standardised features.
        y: Standardised features.
        components: Principal components of x and of y, see `_find_components`.
        size: Largest number of principal components of each side.
    """
    x_directions, y_directions = (part[:, :size] for part in components)
    u, v = x.double() @ x_directions, y.double() @ y_directions
    left, _, right = torch.linalg.svd(u.T @ v / len(x), full_matrices=False)
    return x_directions @ left, y_directions @ right.T


class _GaussianRatio:
    """Density ratio of a Gaussian with a few canonical correlations.

    Args:
        directions: Directions of the canonical variates of x and of y.
        x: Standardised features by which the correlations are measured, `(n, D_x)`.
        y: Standardised features by which the correlations are measured, `(n, D_y)`.
    """

    def __init__(self, directions: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
        self._directions = directions
        variates = [part.double() @ turned for part, turned in zip((x, y), directions, strict=True)]
        self._means = [part.mean(0) for part in variates]
        self._deviations = [part.std(0, correction=0).clamp_min(1e-12) for part in variates]
        u, v = self._project(x, y)
        correlation = (u * v).mean(0)
        # What chance alone makes of unrelated variates counts as 0.
        correlation = torch.where(correlation > 2 / math.sqrt(len(x)), correlation, 0)
        self._correlation = correlation.clamp_max(_LARGEST_CORRELATION)

    def compute_information(self, x: torch.Tensor, y: torch.Tensor) -> list[float]:
        """Compute the bound of `estimate_information` from rows `(N, D_x)` and `(N, D_y)`, for each of `_POWERS`."""
        u, v = self._project(x, y)
        square = self._correlation.square()
        rest = 1 - square
        own = -square / (2 * rest)
        ratios = (u * (self._correlation / rest)) @ v.T + (u.square() @ own)[:, None] + (v.square() @ own)[None]
        ratios = ratios - rest.log().sum() / 2
        others = ratios[~torch.eye(len(ratios), dtype=torch.bool)]
        estimates = []
        for power in _POWERS:
            found = float((others * power).logsumexp(0)) - math.log(len(others))
            determinant = (1 + power * square / rest).square() - square * (power / rest).square()
            of_gaussian = float(-(power * rest.log() + determinant.log()).sum() / 2)
            estimates.append(float(ratios.diagonal().mean()) * power - max(found, of_gaussian))
        return estimates

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [
            ((part.double() @ directions - mean) / deviation).clamp(-_FARTHEST, _FARTHEST)
            for part, directions, mean, deviation in zip(
                (x, y), self._directions, self._means, self._deviations, strict=True
            )
        ]


def _find_components(values: torch.Tensor) -> torch.Tensor:
    """Return the directions `(D, k)` along which the first principal components have unit deviation."""
    values = values.double()
    _, deviations, directions = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    deviations = deviations / math.sqrt(len(values))
    kept = min(_DIMENSIONS[-1], max(1, int((deviations > 1e-4 * deviations[0]).sum())))
    return directions[:kept].T / deviations[:kept].clamp_min(1e-12)


def _reduce(own: torch.Tensor, held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn wide features into their first principal components, with the deviations that they have."""
    if own.shape[1] <= _WIDEST:
        return own, held_out
    directions = torch.linalg.svd(own.double() - own.double().mean(0), full_matrices=False)[2][:_WIDEST].T.float()
    return own @ directions, held_out @ directions


def _fit_head(features: np.ndarray, numbers: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few steps more would not change the estimate
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        return LogisticRegression(C=strength, max_iter=200).fit(features, numbers)


def _choose_strength(features: np.ndarray, numbers: np.ndarray) -> float:
    order = np.random.default_rng(0).permutation(len(numbers))
    tested, fits = order[: len(order) // 5], order[len(order) // 5 :]
    tested = tested[np.isin(numbers[tested], numbers[fits])]
    if len(tested) == 0 or len(np.unique(numbers[fits])) < 2:
        return 1.0
    scores = {}
    for strength in _STRENGTHS:
        head = _fit_head(features[fits], numbers[fits], strength)
        places = np.searchsorted(head.classes_, numbers[tested])
        scores[strength] = head.predict_log_proba(features[tested])[np.arange(len(tested)), places].mean()
    return max(scores, key=lambda strength: scores[strength])


def _temper(logits: np.ndarray, prior: np.ndarray, scale: float, share: float) -> np.ndarray:
    """Return log probabilities `(N, C)`: softened predictions, mixed with the class frequencies."""
    softened = torch.from_numpy(logits * scale).log_softmax(-1).numpy()
    with np.errstate(divide="ignore"):
        return np.logaddexp(softened + np.log1p(-share), prior + np.log(share))
