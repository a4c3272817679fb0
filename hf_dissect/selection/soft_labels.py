"""How far each pair is trusted: GSC's soft correspondence labels, kept in the ledger and renewed once an epoch."""

import logging
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from hf_dissect.selection.ledger import SampleLedger

logger = logging.getLogger(__name__)

FEWEST_PAIRS = 10
SMALLEST_COMPONENT = 0.01
"""Share of the values; what is left of one value alone, or of a few outliers, is no component."""
SMALLEST_SPREAD = 1e-6
"""Between the values; less is rounding in single precision, which a scaling would blow up to a difference."""


NETWORK_SUFFIXES = ("", "_2")
"""Suffixes of the ledger columns of each network."""


def label_columns(ledger: SampleLedger) -> list[tuple[str, ...]]:
    """Return the ledger columns that hold soft labels, whose minimum counts; one entry for each network."""
    columns = [SoftLabels(suffix=suffix).label_columns for suffix in NETWORK_SUFFIXES]
    return [names for names in columns if set(names) <= set(ledger.columns)]


class SoftLabels:
    """Soft correspondence labels (GSC, CVPR 2024, arXiv 2405.16996): `y = min(y_cm, y_im)`, 1 until known.

    During an epoch, the evidence of each visit is recorded. Once an epoch `y_cm` moves to the pair's `agreement`, and
    `y_im` to the posterior that its `structure` is of the upper of two Gaussian components. A pair that was not seen
    since the last update keeps its labels.

    Args:
        beta: weight of the new value in both moving averages, in (0, 1].
        seed: of the mixture's start.
        suffix: of the ledger columns, where several labels are kept side by side.

    Attributes:
        evidence_columns, label_columns: ledger columns of agreement and structure, and of `y_cm` and `y_im`.
        columns: all of them.

    Raises:
        ValueError: an argument is outside of what is listed.
    """

    columns = ("agreement", "structure", "y_cm", "y_im")

    def __init__(self, beta: float = 0.7, seed: int = 0, suffix: str = ""):
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta}: the weight of the new label must be above 0 and at most 1.")
        check_seed(seed)
        self.beta = beta
        self.seed = seed
        self.columns = tuple(column + suffix for column in SoftLabels.columns)
        self.evidence_columns, self.label_columns = self.columns[:2], self.columns[2:]

    def of(self, ledger: SampleLedger, sample_id: torch.Tensor) -> torch.Tensor:
        """Labels of pairs, int64 `(B,)`: float32 `(B,)` in [0, 1] on the CPU, 1 for a pair without any."""
        return torch.minimum(*(_known(ledger.read(column, sample_id)) for column in self.label_columns))

    def as_columns(self, evidence: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evidence (`hf_dissect.losses.gsc_evidence`) under the names of its ledger columns."""
        return dict(zip(self.evidence_columns, (evidence["agreement"], evidence["structure"]), strict=True))

    def record(
        self, ledger: SampleLedger, sample_id: torch.Tensor, agreement: torch.Tensor, structure: torch.Tensor
    ) -> None:
        """Note the evidence of pairs, `(B,)` each (`hf_dissect.losses.gsc_evidence`), over that of earlier visits."""
        for column, values in zip(self.evidence_columns, (agreement, structure), strict=True):
            ledger.write(column, sample_id, values)

    def update(self, ledger: SampleLedger) -> None:
        """Renew the labels of the pairs with evidence, and forget the evidence. On all ranks the same."""
        agreement, structure = map(ledger.column, self.evidence_columns)
        (seen,) = (~agreement.isnan()).nonzero(as_tuple=True)
        if not len(seen):
            return
        posterior = upper_component_posterior(structure[seen].numpy(), seed=self.seed)
        sample_id = ledger.ids[seen]
        for column, new in zip(self.label_columns, (agreement[seen], torch.from_numpy(posterior)), strict=True):
            old = _known(ledger.column(column)[seen])
            ledger.write(column, sample_id, self.beta * new + (1 - self.beta) * old)
        for column in self.evidence_columns:
            ledger.write(column, sample_id, torch.full((len(seen),), torch.nan))


def upper_component_posterior(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Probability of each value to be of the upper of two Gaussian components.

    The values are scaled to [0, 1] by their minimum and maximum. The mixture is scikit-learn's, with the settings of
    the paper (and of DivideMix, arXiv 2002.07394): at most 10 iterations, tolerance 1e-2, 5e-4 added to the variances.
    It is fitted by one thread, so that all ranks get the same numbers. Where there are no two components to be told
    apart, all are of the upper one, and a warning says why.

    Args:
        values: `(n,)`.
        seed: of the mixture's start.

    Returns:
        float64 `(n,)`.

    Raises:
        ValueError: a seed that is negative or too large.
    """
    check_seed(seed)
    values = np.asarray(values, np.float64)
    try:
        return _upper_component(_to_unit_interval(values), seed)
    except _NoTwoComponentsError as error:
        logger.warning("No two components among %d pairs, which are all taken for matched: %s.", len(values), error)
        return np.ones(len(values))


class _NoTwoComponentsError(Exception):
    """Says why a mixture would tell nothing."""


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
    # scikit-learn takes seconds to import; whoever fits nothing need not wait.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are the method's, converged or not
        try:
            posteriors = mixture.fit(values[:, None]).predict_proba(values[:, None])
        except ValueError as error:
            raise _NoTwoComponentsError(f"the mixture cannot be fitted ({error})") from error
    smallest = mixture.weights_.min()
    if smallest < max(SMALLEST_COMPONENT, 1.5 / len(values)):
        raise _NoTwoComponentsError(f"one component has a share of {smallest:.2g} only")
    return posteriors[:, mixture.means_.argmax()]


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that scikit-learn does not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be at least 0 and below 2^32.")


def _known(labels: torch.Tensor) -> torch.Tensor:
    """Labels, 1 where there is none."""
    return labels.nan_to_num(nan=1.0)
