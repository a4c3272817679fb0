"""Zero-shot accuracy from image and class embeddings, for the `evaluate` module and the classifier alike."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_dissect.evaluation.embeddings import (
    TIE_TOLERANCE,
    EmbeddingsLike,
    as_embeddings,
    check_positive_integer,
    check_same_dim,
    normalize_rows,
)


def zero_shot_metrics(
    image_embeds: EmbeddingsLike,
    class_embeds: EmbeddingsLike,
    labels: Tensor | np.ndarray | list[int],
    top_k: Sequence[int] = (1, 5),
    *,
    block_size: int = 1024,
) -> dict[str, float]:
    """Compute the accuracy of choosing the class with the nearest embedding (CLIP, arXiv 2103.00020, section 3.1).

    Args:
        image_embeds: Embeddings of any scale, `(num_images, dim)`.
        class_embeds: Embeddings of any scale, `(num_classes, dim)`.
        labels: Class of each image, `(num_images,)` integers, rows of `class_embeds`.
        top_k: Numbers of nearest classes among which the right one must be; those above `num_classes` are left out.
        block_size: Number of images compared with all classes at a time.

    Returns:
        `accuracy@k` for each k and `mean_per_class_accuracy` (top-1, over the classes that occur in `labels`), each
        from 0 to 1. A class that ties with the right one counts as nearer.

    Raises:
        ValueError: If embeddings are empty, not finite or misshapen, or labels do not match them.
    """
    for k in top_k:
        check_positive_integer("A k of top_k", k)
    ranks = rank_classes(image_embeds, class_embeds, labels, block_size=block_size)
    return summarise_class_ranks(ranks, torch.as_tensor(labels).to(ranks.device), len(class_embeds), top_k)


def rank_classes(
    image_embeds: EmbeddingsLike,
    class_embeds: EmbeddingsLike,
    labels: Tensor | np.ndarray | list[int],
    *,
    block_size: int = 1024,
) -> Tensor:
    """Compute the rank of the right class of each image, int64 `(num_images,)` from 1; see `zero_shot_metrics`."""
    check_positive_integer("block_size", block_size)
    images = as_embeddings("image_embeds", image_embeds)
    classes = as_embeddings("class_embeds", class_embeds, device=images.device)
    check_same_dim("image_embeds", images, "class_embeds", classes)
    truth = _check_labels(labels, len(images), len(classes)).to(images.device)

    class_unit = normalize_rows(classes)
    ranks = []
    for block, label in zip(images.split(block_size), truth.split(block_size), strict=True):
        cosines = normalize_rows(block) @ class_unit.T
        # The right class ties with itself, so that the count starts at 1.
        ranks.append((cosines >= cosines.gather(1, label[:, None]) - TIE_TOLERANCE).sum(dim=1))
    return torch.cat(ranks)


def summarise_class_ranks(
    rank: Tensor, labels: Tensor, num_classes: int, top_k: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Compute the metrics of `zero_shot_metrics` from the ranks of the right classes.

    Args:
        rank: Rank of the right class of each image, int64 `(num_images,)`, from 1.
        labels: Class of each image, `(num_images,)` integers.
        num_classes: Number of classes.
        top_k: Numbers of nearest classes among which the right one must be; those above `num_classes` are left out.
    """
    truth = labels.long()
    metrics = {f"accuracy@{k}": (rank <= k).double().mean().item() for k in top_k if k <= num_classes}
    images_of_class = torch.bincount(truth, minlength=num_classes)
    hits_of_class = torch.bincount(truth[rank == 1], minlength=num_classes)
    occurs = images_of_class > 0
    metrics["mean_per_class_accuracy"] = (hits_of_class[occurs] / images_of_class[occurs].double()).mean().item()
    return metrics


def _check_labels(labels: Tensor | np.ndarray | list[int], num_images: int, num_classes: int) -> Tensor:
    truth = torch.as_tensor(labels)
    if truth.shape != (num_images,):
        raise ValueError(f"labels has shape {tuple(truth.shape)}, but must be ({num_images},), one label per image.")
    if truth.dtype.is_floating_point or truth.dtype.is_complex or truth.dtype == torch.bool:
        raise ValueError(f"labels has dtype {truth.dtype}, but must hold integers: rows of class_embeds.")
    outside = ((truth < 0) | (truth >= num_classes)).nonzero().flatten()
    if len(outside):
        raise ValueError(
            f"labels[{int(outside[0])}] is {int(truth[outside[0]])}, but there are {num_classes} classes, "
            f"0 to {num_classes - 1}."
        )
    return truth.long()
