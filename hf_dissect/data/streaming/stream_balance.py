"""Visits of the pairs of a stream in a pass, decided by the id of a pair alone, whoever reads it."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_dissect.data.cluster_balance import name_cluster
from hf_dissect.data.pair_columns import key_hash
from hf_dissect.data.sampling_file import SamplingWeights

FIRST_CHECKED = 10_000
"""Number of pairs of a part of the stream of which the sampling file must know one."""


class StreamBalance:
    """Rule that drops, keeps or repeats the pairs of a stream.

    A pair of weight `w` was visited `floor(w * E + u)` times after `E` passes, with a number `u` in [0, 1) that
    follows from seed and id. So the number of its visits is `E * w`, rounded down or up, for any number of ranks and
    workers, and after a resume. A pair that the file lacks has the weight 1.

    Args:
        weights: Weights by cluster or id.
        column: Column of the clusters; None to look pairs up by id.
        max_visits: Largest number of visits in a pass.
        seed: Seed of the choices.

    Attributes:
        known: Number of pairs so far, of those that this process has read, that the file knows.
        lacking: Number of pairs that it lacks.
    """

    def __init__(self, weights: SamplingWeights, column: str | None, max_visits: float, seed: int) -> None:
        self.weights = weights
        self.column = column
        self.max_visits = max_visits
        self.seed = seed
        self.known = self.lacking = 0

    @property
    def fingerprint(self) -> str:
        """Text that differs between rules that visit other pairs."""
        digest = hashlib.sha256(repr((self.column, self.max_visits, self.seed)).encode())
        if self.column is not None:
            digest.update(repr(sorted((self.weights.clusters or {}).items(), key=repr)).encode())
        elif self.weights.ids is not None and self.weights.weights is not None:
            digest.update(self.weights.ids.tobytes() + self.weights.weights.tobytes())
        return digest.hexdigest()[:16]

    def count_visits(self, row: Mapping[str, Any], sample_id: int, pass_number: int) -> int:
        """Return how often a pair is visited in a pass over the data.

        Args:
            row: Row of the stream with the pair.
            sample_id: Id of the pair.
            pass_number: Number of the pass, from 0.

        Raises:
            ValueError: The file knows none of the first pairs, or a cluster is neither text nor a whole number.
        """
        weight = self._find_weight(row, sample_id)
        start = (key_hash(f"{self.seed}/{sample_id}") >> 10) / 2**53
        return math.floor(weight * (pass_number + 1) + start) - math.floor(weight * pass_number + start)

    def _find_weight(self, row: Mapping[str, Any], sample_id: int) -> float:
        if self.column is not None:
            weight = (self.weights.clusters or {}).get(name_cluster(self.column, row[self.column]), math.nan)
        else:
            weight = float(self.weights.look_up(np.array([sample_id]))[0])
        if weight == weight:
            self.known += 1
            return min(weight, self.max_visits)
        self.lacking += 1
        if not self.known and self.lacking >= FIRST_CHECKED:
            self.check_known()
        return 1.0

    def check_known(self) -> None:
        """Check that the file knows any of the pairs that were read.

        Raises:
            ValueError: It knows none.
        """
        if self.lacking and not self.known:
            by = f"clusters (data.balance_column {self.column!r})" if self.column else "ids (data.id_column)"
            raise ValueError(
                f"data.sampling_file {self.weights.name!r} knows none of {self.lacking} pairs by their {by}: it "
                "belongs to other data, or the column is another one than in the run that wrote it."
            )
