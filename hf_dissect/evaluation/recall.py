"""Recall at K of cross-modal retrieval, from exact ranks computed in blocks of similarities."""

from typing import Any

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

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
RETRIEVAL_FIGURES = (
    *(f"{direction}_R@{k}" for direction in DIRECTIONS for k in RECALL_AT),
    *(f"{direction}_median_rank" for direction in DIRECTIONS),
    "recall_sum",
)
"""Names of the figures of `retrieval_metrics`."""


def retrieval_metrics(
    image_embeds: EmbeddingsLike,
    text_embeds: EmbeddingsLike,
    image_of_text: Tensor | np.ndarray | list[int] | None = None,
    *,
    block_size: int = 1024,
) -> dict[str, float]:
    """Compute recall and median rank of cross-modal retrieval by cosine, in both directions.

    The protocol is the usual one of Flickr and MS-COCO (Karpathy and Fei-Fei 2015, arXiv 1412.2306, section 4.2): an
    image finds the best-ranked of its own captions, and a caption finds its one image.

    Args:
        image_embeds: Embeddings of any scale, `(num_images, dim)`.
        text_embeds: Embeddings of any scale, `(num_texts, dim)`.
        image_of_text: Row of `image_embeds` that each caption belongs to, `(num_texts,)`; None if row j belongs to row
            j. An image without a caption is not a query, but a caption can retrieve it wrongly.
        block_size: Side of the blocks in which similarities are computed; a larger one takes more memory and fewer
            calls.

    Returns:
        `image_to_text_R@1`, `@5`, `@10` and `text_to_image_R@1`, `@5`, `@10` in per cent; `image_to_text_median_rank`
        and `text_to_image_median_rank`, counted from 1; and `recall_sum`, the sum of the six recalls (at most 600). A
        candidate that ties with the right one counts as ranked before it, so that equal embeddings gain nothing.

    Raises:
        ValueError: If embeddings are empty, not finite or misshapen, or `image_of_text` does not match them.
    """
    image_ranks, text_ranks = retrieval_ranks(image_embeds, text_embeds, image_of_text, block_size=block_size)
    metrics = {}
    for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in RECALL_AT:
            metrics[f"{direction}_R@{k}"] = 100 * (ranks <= k).double().mean().item()
    recall_sum = sum(metrics.values())
    metrics["image_to_text_median_rank"] = float(np.median(image_ranks.cpu().numpy()))
    metrics["text_to_image_median_rank"] = float(np.median(text_ranks.cpu().numpy()))
    metrics["recall_sum"] = recall_sum
    return metrics


def retrieval_from_pairs(
    image_embeds: EmbeddingsLike,
    text_embeds: EmbeddingsLike,
    image_key: Tensor | np.ndarray | list[Any],
    *,
    block_size: int = 1024,
) -> dict[str, float]:
    """Compute `retrieval_metrics` of (image, caption) pairs, in which an image can occur several times.

    Args:
        image_embeds: Embeddings `(num_pairs, dim)`; the first row counts for pairs that share an image.
        text_embeds: Embeddings `(num_pairs, dim)`.
        image_key: Integers or strings `(num_pairs,)`, equal for pairs that share an image.
        block_size: Side of the blocks in which similarities are computed.

    Returns:
        Metrics as in `retrieval_metrics`.

    Raises:
        ValueError: If `retrieval_metrics` raises it, or the three arguments differ in length.
    """
    images_of_pairs = as_embeddings("image_embeds", image_embeds)
    keys = image_key.cpu().numpy() if isinstance(image_key, Tensor) else np.asarray(image_key)
    if keys.shape != (len(images_of_pairs),) or len(text_embeds) != len(images_of_pairs):
        raise ValueError(
            f"A pair is one row of each, but there are {len(images_of_pairs)} image_embeds, {len(text_embeds)} "
            f"text_embeds and image_key of shape {keys.shape}."
        )
    _, first_row, image_of_pair = np.unique(keys, return_index=True, return_inverse=True)
    images = images_of_pairs[torch.as_tensor(first_row, device=images_of_pairs.device)]
    return retrieval_metrics(images, text_embeds, image_of_pair, block_size=block_size)


def retrieval_ranks(
    image_embeds: EmbeddingsLike,
    text_embeds: EmbeddingsLike,
    image_of_text: Tensor | np.ndarray | list[int] | None = None,
    *,
    block_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Compute the exact ranks, counted from 1, at which right answers are found.

    Args:
        image_embeds: Embeddings of any scale, `(num_images, dim)`.
        text_embeds: Embeddings of any scale, `(num_texts, dim)`.
        image_of_text: Row of `image_embeds` that each caption belongs to, `(num_texts,)`; None if row j belongs to row
            j.
        block_size: Side of the blocks in which similarities are computed.

    Returns:
        Rank of the best own caption of each image that has one, int64 `(num_images_with_caption,)` in row order, and
        rank of its image for each caption, int64 `(num_texts,)`.

    Raises:
        ValueError: If embeddings are empty, not finite or misshapen, or `image_of_text` does not match them.
    """
    check_positive_integer("block_size", block_size)
    images = as_embeddings("image_embeds", image_embeds)
    texts = as_embeddings("text_embeds", text_embeds, device=images.device)
    check_same_dim("image_embeds", images, "text_embeds", texts)
    owner = _check_owners(image_of_text, len(images), len(texts)).to(images.device)

    own_of_text = _compute_own_cosines(images, texts, owner, block_size)
    own_of_image = own_of_text.new_full((len(images),), -torch.inf)
    own_of_image.scatter_reduce_(0, owner, own_of_text, reduce="amax")

    image_ranks = torch.ones(len(images), dtype=torch.int64, device=images.device)
    text_ranks = torch.ones(len(texts), dtype=torch.int64, device=images.device)
    for first_image in range(0, len(images), block_size):
        image_block = slice(first_image, first_image + block_size)
        image_unit = normalize_rows(images[image_block])
        image_rows = torch.arange(first_image, first_image + len(image_unit), device=images.device)
        for first_text in range(0, len(texts), block_size):
            text_block = slice(first_text, first_text + block_size)
            cosines = image_unit @ normalize_rows(texts[text_block]).T
            # Own captions do not compete: another caption of an image is not a rival of its best one.
            cosines[image_rows[:, None] == owner[text_block]] = -torch.inf
            image_ranks[image_block] += (cosines >= own_of_image[image_block, None] - TIE_TOLERANCE).sum(dim=1)
            text_ranks[text_block] += (cosines >= own_of_text[text_block] - TIE_TOLERANCE).sum(dim=0)
    return image_ranks[own_of_image > -torch.inf], text_ranks


def _compute_own_cosines(images: Tensor, texts: Tensor, owner: Tensor, block_size: int) -> Tensor:
    """Compute the cosine of each caption with its own image, float64 `(num_texts,)`."""
    blocks = zip(texts.split(block_size), owner.split(block_size), strict=True)
    return torch.cat([(normalize_rows(text) * normalize_rows(images[rows])).sum(dim=1) for text, rows in blocks])


def _check_owners(image_of_text: Tensor | np.ndarray | list[int] | None, num_images: int, num_texts: int) -> Tensor:
    if image_of_text is None:
        if num_images != num_texts:
            raise ValueError(
                f"There are {num_images} image_embeds and {num_texts} text_embeds; where images have several "
                "captions, give image_of_text, the image row of each caption."
            )
        return torch.arange(num_images)
    owner = torch.as_tensor(image_of_text)
    if owner.shape != (num_texts,):
        raise ValueError(f"image_of_text has shape {tuple(owner.shape)}, but must be ({num_texts},): one per caption.")
    if owner.dtype.is_floating_point or owner.dtype.is_complex or owner.dtype == torch.bool:
        raise ValueError(f"image_of_text has dtype {owner.dtype}, but must hold integers: rows of image_embeds.")
    outside = ((owner < 0) | (owner >= num_images)).nonzero().flatten()
    if len(outside):
        raise ValueError(
            f"image_of_text[{int(outside[0])}] is {int(owner[outside[0]])}, but must be a row of image_embeds, "
            f"0 to {num_images - 1}. For keys of another kind, use retrieval_from_pairs."
        )
    return owner.long()
