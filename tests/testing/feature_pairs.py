"""Pairs of image features and captions that small encoders learn within seconds."""

import datasets
import numpy as np

from hf_dissect.data import shuffle_captions

THINGS = "cat dog house car tree boat child ball river bird horse table lamp bridge snow rain".split()


def make_feature_pairs(count: int = 400, rate: float = 0.25, seed: int = 0) -> datasets.Dataset:
    """Make features of images with 5 of 16 things, and captions that name 3; a share is of other images."""
    rng = np.random.default_rng(seed)
    look = rng.normal(size=(16, 24))
    things = [rng.choice(16, 5, replace=False) for _ in range(count)]
    rows = {
        "image_features": [(look[seen].sum(0) + 0.3 * rng.normal(size=24)).tolist() for seen in things],
        "caption": [
            f"{' and '.join(THINGS[thing] for thing in seen[:3])} {place}" for place, seen in enumerate(things)
        ],
        "name": [f"n{place}" for place in range(count)],
    }
    return shuffle_captions(datasets.Dataset.from_dict(rows), rate=rate, seed=seed)
