"""A random sample of pairs, the same in each run over the same data, for figures that need no more."""

from typing import Any

import numpy as np
import torch

from hf_dissect.data.pairs import PairDataset, PairStream

SEED = 0
"""Seed of the sample, which does not depend on the seed of a run: all runs are measured on the same pairs."""


def sample_pairs(pairs: Any, count: int | None) -> Any:
    """Return a random sample of pairs in the order of the data, or the pairs themselves if there are no more.

    Of a stream, whose pairs have no numbers, the first rows are taken.

    Args:
        pairs: Map-style or streamed pairs.
        count: Largest number of pairs; None for all.
    """
    if count is None:
        return pairs
    if isinstance(pairs, PairStream):
        return PairStream(pairs.rows.take(count), pairs.columns)
    if not hasattr(pairs, "__len__") or len(pairs) <= count:
        return pairs
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(pairs))[:count])
    return pairs.select(chosen) if isinstance(pairs, PairDataset) else torch.utils.data.Subset(pairs, chosen.tolist())
