"""GSC's soft correspondence labels, the trust in each pair, kept in the ledger and updated once an epoch."""

import logging
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from hf_dissect.selection.ledger import SampleLedger

logger = logging.getLogger(__name__)

FEWEST_PAIRS = 10
SMALLEST_COMPONENT = 0.01
"""Smallest share of the values in a component; one value alone, or a few outliers, are not a component."""
SMALLEST_SPREAD = 1e-6
"""Smallest range of the values; a smaller one is rounding in single precision, which scaling would magnify."""


NETWORK_SUFFIXES = ("", "_2")
"""Suffixes of the ledger columns of each network."""


def find_label_columns(ledger: SampleLedger) -> list[tuple[str, ...]]:
    """Return the ledger columns that hold soft labels, whose minimum counts; one entry for each network."""
    columns = [SoftLabels(suffix=suffix).label_columns for suffix in NETWORK_SUFFIXES]
    return [names for names in columns if set(names) <= set(ledger.columns)]


class SoftLabels:
    """Soft correspondence labels (GSC, CVPR 2024, arXiv 2405.16996): `y = min(y_cm, y_im)`, 1 until known.

    The evidence of each visit is recorded during an epoch. Once an epoch, `y_cm` moves to the pair's `agreement`, and
    `y_im` to the posterior of the upper of two Gaussian components for its `structure`. A pair that was not seen since
    the last update keeps its labels.

    Args:
        beta: Weight of the new value in both moving averages, in (0, 1].
        seed: Seed of the mixture's initialisation.
        suffix: Suffix of the ledger columns, for several labels side by side.

    Attributes:
        evidence_columns: Ledger columns of agreement and structure.
        label_columns: Ledger columns of `y_cm` and `y_im`.
        columns: All of them.

    Raises:
        ValueError: If an argument is out of its range.
    """

    columns: tuple[str, ...] = ("agreement", "structure", "y_cm", "y_im")

    def __init__(self, beta: float = 0.7, seed: int = 0, suffix: str = "") -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta}: the weight of the new label must be above 0 and at most 1.")
        check_seed(seed)
        self.beta = beta
        self.seed = seed
        self.columns = tuple(column + suffix for column in SoftLabels.columns)
        self.evidence_columns, self.label_columns = self.columns[:2], self.columns[2:]

    def of(self, ledger: SampleLedger, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the labels of some pairs.

        Args:
            ledger: Ledger with the columns of the labels.
            sample_id: Ids of the pairs, int64 `(B,)`.

        Returns:
            Labels, float32 `(B,)` in [0, 1] on the CPU; 1 for a pair without any.
        """
        return self._join(ledger.read(column, sample_id) for column in self.label_columns)

    def of_all(self, ledger: SampleLedger) -> torch.Tensor:
        """Return the labels of all pairs, float32 `(len(ledger),)`, in the order of the columns; see `of`."""
        return self._join(map(ledger.column, self.label_columns))

    def _join(self, columns: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.minimum(*map(_fill_unknown, columns))

    def as_columns(self, evidence: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return evidence (`hf_dissect.losses.gsc_evidence`) under the names of its ledger columns."""
        return dict(zip(self.evidence_columns, (evidence["agreement"], evidence["structure"]), strict=True))

    def record(
        self, ledger: SampleLedger, sample_id: torch.Tensor, agreement: torch.Tensor, structure: torch.Tensor
    ) -> None:
        """Record the evidence of some pairs (`hf_dissect.losses.gsc_evidence`) over that of earlier visits.

        Args:
            ledger: Ledger to write to.
            sample_id: Ids of the pairs, int64 `(B,)`.
            agreement: Agreement of each pair, `(B,)`.
            structure: Structure of each pair, `(B,)`.
        """
        for column, values in zip(self.evidence_columns, (agreement, structure), strict=True):
            ledger.write(column, sample_id, values)

    def update(self, ledger: SampleLedger) -> None:
        """Update the labels of the pairs with evidence, and clear the evidence.

        All ranks compute the same labels.

        Args:
            ledger: Ledger to read from and write to.
        """
        agreement, structure = self.evidence_columns
        seen, structures = ledger.find_known(structure, by=agreement)
        if not len(seen):
            return
        posterior = torch.from_numpy(compute_upper_posterior(structures.numpy(), seed=self.seed))
        # Each process renews the labels of the pairs that it holds.
        is_own, own = ledger.is_own(seen), ledger.own
        sample_id = seen[is_own]
        for column, new in zip(self.label_columns, (own.read(agreement, sample_id), posterior[is_own]), strict=True):
            old = _fill_unknown(own.read(column, sample_id))
            own.write(column, sample_id, self.beta * new + (1 - self.beta) * old)
        for column in self.evidence_columns:
            own.write(column, sample_id, torch.full((len(sample_id),), torch.nan))


def compute_upper_posterior(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Compute the probability that each value belongs to the upper of two Gaussian components.

    The values are scaled to [0, 1] by their minimum and maximum. The mixture is scikit-learn's, with the settings of
    the paper (and of DivideMix, arXiv 2002.07394): at most 10 iterations, tolerance 1e-2, 5e-4 added to the variances.
    One thread fits it, so that all ranks get the same numbers. If two components cannot be distinguished, all values
    belong to the upper one, and a warning gives the reason.

    Args:
        values: Values to divide, `(n,)`.
        seed: Seed of the mixture's initialisation.

    Returns:
        Probabilities, float64 `(n,)`.

    Raises:
        ValueError: If the seed is negative or too large.
    """
    check_seed(seed)
    values = np.asarray(values, np.float64)
    try:
        return _upper_component(_to_unit_interval(values), seed)
    except _NoTwoComponentsError as error:
        logger.warning("No two components among %d pairs, which are all treated as matched: %s.", len(values), error)
        return np.ones(len(values))


class _NoTwoComponentsError(Exception):
    """The reason that a mixture would give no information."""


def _to_unit_interval(values: np.ndarray) -> np.ndarray:
    if len(values) < FEWEST_PAIRS:
        raise _NoTwoComponentsError(f"at least {FEWEST_PAIRS} are needed")
    if not np.isfinite(values).all():
        raise _NoTwoComponentsError(f"{(~np.isfinite(values)).sum()} values are not finite")
    low, high = values.min(), values.max()
    if high - low < SMALLEST_SPREAD:
        raise _NoTwoComponentsError(f"all values are the same, {low:g}")
    return (values - low) / (high - low)


def _upper_component(values: np.ndarray, seed: int) -> np.ndarray:
    # scikit-learn takes seconds to import, which other rules do not need.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the method uses ten iterations, converged or not
        try:
            posteriors = mixture.fit(values[:, None]).predict_proba(values[:, None])
        except ValueError as error:
            raise _NoTwoComponentsError(f"the mixture cannot be fitted ({error})") from error
    smallest = mixture.weights_.min()
    if smallest < max(SMALLEST_COMPONENT, 1.5 / len(values)):
        raise _NoTwoComponentsError(f"one component has a share of {smallest:.2g} only")
    return posteriors[:, mixture.means_.argmax()]


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that scikit-learn does not accept."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be at least 0 and below 2^32.")


def _fill_unknown(labels: torch.Tensor) -> torch.Tensor:
    """Replace missing labels by 1."""
    return labels.nan_to_num(nan=1.0)
