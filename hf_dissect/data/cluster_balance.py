"""Visits of pairs in an epoch by the cluster that a column names: large clusters less often, small ones more often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_dissect.data.arrow_columns import is_list, read_chunked_column

_DIGITS = 4
"""Significant digits of weights of single pairs, so that pairs of nearly the same weight form a group."""
_ENOUGH = 1 - 1e-9
"""Visits of a group in an epoch, up to rounding, from which on it can have its share in every epoch."""


@dataclass(frozen=True)
class Balance:
    """Groups of pairs that are visited equally often.

    Attributes:
        codes: Group of each pair, int `(pairs,)`; -1 for pairs that are never visited.
        visits: Expected visits in an epoch of a pair of each group, float64 `(groups,)`. Their sum over all pairs is
            the number of pairs.
        clusters: Names of the clusters of the column, None for pairs without one; empty if there is no column.
        cluster_codes: Cluster of each pair, int `(pairs,)`; None if there is no column.
    """

    codes: np.ndarray
    visits: np.ndarray
    clusters: Sequence[str | None] = ()
    cluster_codes: np.ndarray | None = None

    @property
    def visits_of_pairs(self) -> np.ndarray:
        """Expected visits in an epoch of each pair, float64 `(pairs,)`."""
        return np.where(self.codes < 0, 0.0, self.visits[self.codes])


def find_power_weights(sizes: np.ndarray, strength: float) -> np.ndarray:
    """Return the weight of a pair of each cluster, `size ** -strength`.

    The share of a cluster in an epoch is then in proportion to `size ** (1 - strength)`: as it is for 0, its square
    root for 0.5, and the same for all clusters for 1, as hierarchical k-means samples (arXiv 2405.15613). Between the
    two, clusters keep their order by size, as in DynamiCS (arXiv 2604.27932), which samples again in each epoch.

    Args:
        sizes: Number of pairs of each cluster, `(clusters,)`, each at least 1.
        strength: Strength of the balance, in [0, 1].
    """
    return np.asarray(sizes, np.float64) ** -strength


def find_visits(counts: np.ndarray, weights: np.ndarray, most: float) -> np.ndarray:
    """Find the visits `min(most, c * weight)` of the pairs of each group, which sum to the number of pairs.

    Args:
        counts: Number of pairs of each group, `(groups,)`, each at least 1.
        weights: Weight of a pair of each group, `(groups,)`, finite and at least 0.
        most: Largest number of visits in an epoch, at least 1.

    Returns:
        Visits of a pair in an epoch, float64 `(groups,)`.

    Raises:
        ValueError: So few pairs have a weight above 0 that they cannot fill an epoch.
    """
    counts, weights = np.asarray(counts, np.float64), np.asarray(weights, np.float64)
    total, weighted = counts.sum(), counts[weights > 0].sum()
    if most * weighted < total:
        raise ValueError(
            f"only {weighted:.0f} of {total:.0f} pairs have a weight above 0, and each of them is visited at most "
            f"{most:g} times in an epoch: they cannot fill one. Leave the other pairs out of the data, or raise "
            "data.balance_max_visits."
        )
    order = np.argsort(-weights, kind="stable")[: int((weights > 0).sum())]
    sorted_counts, sorted_weights = counts[order], weights[order]
    capped = np.concatenate([[0.0], np.cumsum(sorted_counts)[:-1]])
    rest = np.cumsum((sorted_counts * sorted_weights)[::-1])[::-1]  # the small ones first, so that none is lost
    scale = (total - most * capped) / rest
    first = int(np.argmax(scale * sorted_weights <= most * (1 + 1e-12)))
    return np.minimum(most, scale[first] * weights)


def make_balance(
    codes: np.ndarray, weights: np.ndarray, most: float, clusters: Sequence[str | None] = (), by_pair: bool = False
) -> Balance:
    """Make groups of pairs of the same weight, each with at least one visit in an epoch.

    Groups with less, such as rare clusters of a small weight, are joined with those of the next larger weights; their
    pairs then have the mean of the weights.

    Args:
        codes: Group of each pair, int `(pairs,)`.
        weights: Weight of a pair of each group, `(groups,)`.
        most: Largest number of visits of a pair in an epoch.
        clusters: Names of the groups, if they are the clusters of a column.
        by_pair: True if each pair has a weight of its own, `(pairs,)`, and `codes` has no effect.

    Raises:
        ValueError: Too few pairs have a weight above 0, see `find_visits`.
    """
    if by_pair:
        rounded, codes = np.unique([float(f"{weight:.{_DIGITS}g}") for weight in weights], return_inverse=True)
        counts = np.bincount(codes, minlength=len(rounded))
        weights = np.bincount(codes, weights, minlength=len(rounded)) / counts
    counts = np.bincount(codes, minlength=len(weights))
    present = np.flatnonzero(counts)
    visits = np.zeros(len(weights))
    visits[present] = find_visits(counts[present], weights[present], most)
    groups = _join_rare(counts, visits)
    joined = np.bincount(groups[groups >= 0], (counts * visits)[groups >= 0])
    sizes = np.bincount(groups[groups >= 0], counts[groups >= 0])
    return Balance(groups[codes], joined / sizes, clusters, codes if clusters else None)


def _join_rare(counts: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Return the joined group of each group, -1 for those without pairs or visits."""
    totals = counts * visits
    groups = np.full(len(counts), -1)
    order = [place for place in np.argsort(visits, kind="stable").tolist() if totals[place] > 0]
    number, reached = 0, 0.0
    for place in order:
        groups[place] = number
        reached += totals[place]
        if reached >= _ENOUGH:
            number, reached = number + 1, 0.0
    if reached and number:  # too little is left for a group of its own
        groups[groups == number] = number - 1
    return groups


def read_clusters(rows: Any, name: str) -> tuple[list[str | None], np.ndarray]:
    """Read the clusters of the rows of a table.

    Args:
        rows: Table, a `datasets.Dataset`.
        name: Name of the column.

    Returns:
        Names of the clusters, None for the rows without one, and the place of each row's cluster, int64 `(rows,)`.

    Raises:
        ValueError: The column holds something other than text and whole numbers.
    """
    values = read_chunked_column(rows, name)
    check_cluster_type(name, values.type)
    if pa.types.is_floating(values.type):  # whole numbers, some of which are missing
        values = pc.if_else(pc.is_nan(values), None, values)
        present = values.drop_null()
        if not pc.all(pc.equal(present, pc.round(present))).as_py():
            raise ValueError(f"balance_column={name!r} holds numbers that are not whole; {_WAY_OUT}")
        values = values.cast(pa.int64())
    values = values.combine_chunks().dictionary_encode()
    names = [str(value) for value in values.dictionary.to_pylist() if value is not None]
    codes = values.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    return ([*names, None] if values.null_count else list(names)), codes


_WAY_OUT = "a cluster is text or a whole number, one a row. Mend the column, or leave balance_column out."


def check_cluster_type(name: str, kind: pa.DataType) -> None:
    """Check that a column may hold clusters.

    Raises:
        ValueError: It holds lists, or neither text nor numbers.
    """
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    if is_list(kind) or not any(fits(kind) for fits in kinds):
        raise ValueError(f"balance_column={name!r} holds {kind}; {_WAY_OUT}")


def name_cluster(column: str, value: Any) -> str | None:
    """Return the name of a cluster from its value in a row; None for a row without one.

    Raises:
        ValueError: The value is neither text nor a whole number.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or value != int(value):
        raise ValueError(f"balance_column={column!r} holds {value!r}; {_WAY_OUT}")
    return str(int(value))
