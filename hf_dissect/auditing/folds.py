"""Division of pairs into folds, so that no pair is judged by a model that met its image or its caption."""

import logging

import numpy as np
import torch

from hf_dissect.auditing.scores import FEWEST_PAIRS

logger = logging.getLogger(__name__)

_LARGEST = 1.5
"""Size of the largest fold at most, as a multiple of the mean size."""


def assign_folds(image_key: torch.Tensor, caption_key: torch.Tensor, folds: int, seed: int = 0) -> torch.Tensor:
    """Divide pairs into folds of about equal size.

    Pairs that share an image or a caption, also by way of other pairs, come into the same fold. Where that would put
    most pairs into one fold, only those that share an image do; `find_training_pairs` then leaves out the pairs whose
    captions the scored fold has.

    Args:
        image_key: Keys of the images, int64 `(n,)`, equal where pairs share an image.
        caption_key: Keys of the captions, likewise.
        folds: Number of folds, at least 2.
        seed: Seed of the division.

    Returns:
        Fold of each pair, int64 `(n,)`.

    Raises:
        ValueError: Most pairs share one image, or there are too few for so many folds.
    """
    by_image = _number(image_key)
    for groups in (_connect(by_image, _number(caption_key)), by_image):
        fold = _fill(groups, folds, seed)
        sizes = torch.bincount(fold, minlength=folds)
        images = [len(by_image[fold == number].unique()) for number in range(folds)]
        if sizes.max() <= _LARGEST * len(fold) / folds and min(images) >= FEWEST_PAIRS:
            return fold
        logger.info("%d folds by groups of pairs that share images or captions would hold %s.", folds, sizes.tolist())
    raise ValueError(
        f"{folds} folds of {len(fold)} pairs would hold {', '.join(map(str, sizes.tolist()))} of them and "
        f"{', '.join(map(str, images))} images, since pairs that share an image stay together; give more pairs or "
        "fewer folds, or drop the image that most of them share."
    )


def find_training_pairs(fold: torch.Tensor, scored: int, caption_key: torch.Tensor) -> torch.Tensor:
    """Return the positions of the pairs to train on before fold `scored` is scored, int64.

    Raises:
        ValueError: The pairs have few captions, or those of the other folds are in the scored one as well.
    """
    others = fold != scored
    unknown = ~torch.isin(caption_key, caption_key[~others])
    training = torch.nonzero(others & unknown)[:, 0]
    distinct = [len(caption_key[part].unique()) for part in (training, ~others)]
    if len(training) < others.sum() / 4 or min(distinct) < FEWEST_PAIRS:
        raise ValueError(
            f"The {len(caption_key)} pairs share captions, such as names of classes: of {len(caption_key.unique())} "
            "different ones, too few are left to learn from that are not judged, too. Audit with a model that was "
            "trained on other data: hf-dissect audit MODEL --data DATA"
        )
    return training


def _number(keys: torch.Tensor) -> torch.Tensor:
    return torch.unique(keys, return_inverse=True)[1]


def _connect(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Return the number of the group of each pair: pairs linked by images and captions, over any number of steps."""
    label = torch.arange(len(images))
    while True:
        before = label
        for keys in (images, captions):
            lowest = torch.full((int(keys.max()) + 1,), len(label)).scatter_reduce(0, keys, label, "amin")
            label = lowest[keys]
        label = label[label]  # the label of a label is as low or lower: chains shorten by half
        if torch.equal(label, before):
            return _number(label)


def _fill(groups: torch.Tensor, folds: int, seed: int) -> torch.Tensor:
    """Put groups into folds, large ones first, each into the fold with the fewest pairs."""
    sizes = torch.bincount(groups).numpy()
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    chosen, filled = np.zeros(len(sizes), np.int64), np.zeros(folds, np.int64)
    for group in order.tolist():
        smallest = int(filled.argmin())
        chosen[group] = smallest
        filled[smallest] += sizes[group]
    return torch.from_numpy(chosen)[groups]
