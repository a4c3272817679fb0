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
    text_key: Tensor | np.ndarray | list[Any] | None = None,
    *,
    block_size: int = 1024,
) -> dict[str, float]:
    """Compute recall and median rank of cross-modal retrieval by cosine, in both directions.

    The protocol is the usual one of Flickr and MS-COCO (Karpathy and Fei-Fei 2015, arXiv 1412.2306, section 4.2): an
    image finds the best-ranked of its own captions, and a caption finds its one image. A caption that several images
    have in the same words is right for all of them, if `text_key` says which captions are equal.

    Args:
        image_embeds: Embeddings of any scale, `(num_images, dim)`.
        text_embeds: Embeddings of any scale, `(num_texts, dim)`.
        image_of_text: Row of `image_embeds` that each caption belongs to, `(num_texts,)`; None if row j belongs to row
            j. An image without a caption is not a query, but a caption can retrieve it wrongly.
        text_key: Integers or strings `(num_texts,)`, equal for captions of the same words, of which the first row
            counts; None if no two captions are equal.
        block_size: Side of the blocks in which similarities are computed; a larger one takes more memory and fewer
            calls.

    Returns:
        `image_to_text_R@1`, `@5`, `@10` and `text_to_image_R@1`, `@5`, `@10` in per cent; `image_to_text_median_rank`
        and `text_to_image_median_rank`, counted from 1; and `recall_sum`, the sum of the six recalls (at most 600). A
        candidate that ties with the right one counts as ranked before it, so that equal embeddings gain nothing. With
        `text_key`, also the figures of `count_repeats` if any caption is repeated.

    Raises:
        ValueError: If embeddings are empty, not finite or misshapen, or `image_of_text` or `text_key` does not match
            them.
    """
    image_ranks, text_ranks = retrieval_ranks(
        image_embeds, text_embeds, image_of_text, text_key, block_size=block_size
    )
    metrics = {}
    for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in RECALL_AT:
            metrics[f"{direction}_R@{k}"] = 100 * (ranks <= k).double().mean().item()
    recall_sum = sum(metrics.values())
    metrics["image_to_text_median_rank"] = float(np.median(image_ranks.cpu().numpy()))
    metrics["text_to_image_median_rank"] = float(np.median(text_ranks.cpu().numpy()))
    metrics["recall_sum"] = recall_sum
    if text_key is not None:
        owner = np.arange(len(text_embeds)) if image_of_text is None else image_of_text
        repeats = count_repeats(owner, text_key)
        metrics |= repeats if repeats["repeated_captions"] else {}
    return metrics


def retrieval_from_pairs(
    image_embeds: EmbeddingsLike,
    text_embeds: EmbeddingsLike,
    image_key: Tensor | np.ndarray | list[Any],
    text_key: Tensor | np.ndarray | list[Any] | None = None,
    *,
    block_size: int = 1024,
) -> dict[str, float]:
    """Compute `retrieval_metrics` of (image, caption) pairs, in which an image can occur several times.

    Args:
        image_embeds: Embeddings `(num_pairs, dim)`; the first row counts for pairs that share an image.
        text_embeds: Embeddings `(num_pairs, dim)`.
        image_key: Integers or strings `(num_pairs,)`, equal for pairs that share an image.
        text_key: Integers or strings `(num_pairs,)`, equal for pairs with the same caption; None if no two captions
            are equal.
        block_size: Side of the blocks in which similarities are computed.

    Returns:
        Metrics as in `retrieval_metrics`.

    Raises:
        ValueError: If `retrieval_metrics` raises it, or the arguments differ in length.
    """
    images_of_pairs = as_embeddings("image_embeds", image_embeds)
    keys = _as_keys(image_key)
    if keys.shape != (len(images_of_pairs),) or len(text_embeds) != len(images_of_pairs):
        raise ValueError(
            f"A pair is one row of each, but there are {len(images_of_pairs)} image_embeds, {len(text_embeds)} "
            f"text_embeds and image_key of shape {keys.shape}."
        )
    _, first_row, image_of_pair = np.unique(keys, return_index=True, return_inverse=True)
    images = images_of_pairs[torch.as_tensor(first_row, device=images_of_pairs.device)]
    return retrieval_metrics(images, text_embeds, image_of_pair, text_key, block_size=block_size)


def retrieval_ranks(
    image_embeds: EmbeddingsLike,
    text_embeds: EmbeddingsLike,
    image_of_text: Tensor | np.ndarray | list[int] | None = None,
    text_key: Tensor | np.ndarray | list[Any] | None = None,
    *,
    block_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Compute the exact ranks, counted from 1, at which right answers are found.

    Args:
        image_embeds: Embeddings of any scale, `(num_images, dim)`.
        text_embeds: Embeddings of any scale, `(num_texts, dim)`.
        image_of_text: Row of `image_embeds` that each caption belongs to, `(num_texts,)`; None if row j belongs to row
            j.
        text_key: Integers or strings `(num_texts,)`, equal for captions of the same words, each of which is right for
            the images of all of them; the embedding of the first counts. None if no two captions are equal.
        block_size: Side of the blocks in which similarities are computed.

    Returns:
        Rank of the best right caption of each image that has one, int64 `(num_images_with_caption,)` in row order, and
        rank of the best right image for each caption, int64 `(num_texts,)`. Right answers do not compete with each
        other; a wrong caption that occurs several times counts that often.

    Raises:
        ValueError: If embeddings are empty, not finite or misshapen, or `image_of_text` or `text_key` does not match
            them.
    """
    check_positive_integer("block_size", block_size)
    images = as_embeddings("image_embeds", image_embeds)
    all_texts = as_embeddings("text_embeds", text_embeds, device=images.device)
    check_same_dim("image_embeds", images, "text_embeds", all_texts)
    owner = _check_owners(image_of_text, len(images), len(all_texts)).cpu().numpy()
    first_row, text_of_row, copies = _group_texts(text_key, len(all_texts))
    *links, _ = _link(owner, text_of_row)

    device = images.device
    texts = all_texts[torch.as_tensor(first_row, device=device)]
    image_of_link, text_of_link = (torch.as_tensor(column, device=device) for column in links)
    weights = None if text_key is None else torch.as_tensor(copies, device=device)
    cosine_of_link = _compute_cosines_of_links(images, texts, image_of_link, text_of_link, block_size)
    best_of_image = cosine_of_link.new_full((len(images),), -torch.inf)
    best_of_image.scatter_reduce_(0, image_of_link, cosine_of_link, reduce="amax")
    best_of_text = cosine_of_link.new_full((len(texts),), -torch.inf)
    best_of_text.scatter_reduce_(0, text_of_link, cosine_of_link, reduce="amax")

    image_ranks = torch.ones(len(images), dtype=torch.int64, device=device)
    text_ranks = torch.ones(len(texts), dtype=torch.int64, device=device)
    for first_image in range(0, len(images), block_size):
        image_block = slice(first_image, first_image + block_size)
        image_unit = normalize_rows(images[image_block])
        # The links are sorted by image, so that those of a block lie together.
        ends = np.searchsorted(links[0], (first_image, first_image + block_size))
        rows, columns = image_of_link[slice(*ends)] - first_image, text_of_link[slice(*ends)]
        for first_text in range(0, len(texts), block_size):
            text_block = slice(first_text, first_text + block_size)
            cosines = image_unit @ normalize_rows(texts[text_block]).T
            # Right answers do not compete: another caption of an image is not a rival of its best one.
            inside = (columns >= first_text) & (columns < first_text + block_size)
            cosines[rows[inside], columns[inside] - first_text] = -torch.inf
            before_image = cosines >= best_of_image[image_block, None] - TIE_TOLERANCE
            counted = before_image if weights is None else before_image * weights[text_block]
            image_ranks[image_block] += counted.sum(dim=1)
            text_ranks[text_block] += (cosines >= best_of_text[text_block] - TIE_TOLERANCE).sum(dim=0)
    return image_ranks[best_of_image > -torch.inf], text_ranks[torch.as_tensor(text_of_row, device=device)]


def count_repeats(
    image_of_text: Tensor | np.ndarray | list[int], text_key: Tensor | np.ndarray | list[Any]
) -> dict[str, float]:
    """Count the captions that several images share, and what they would cost if only one's own counted as right.

    Args:
        image_of_text: Image of each caption, integers `(num_texts,)`.
        text_key: Integers or strings `(num_texts,)`, equal for captions of the same words.

    Returns:
        `repeated_captions`, the number of captions in the words of a caption of another image. Unless it is 0, also
        `image_to_text_own_ceiling@1`, `@5`, `@10` and `text_to_image_own_ceiling@1`, `@5`, `@10`: the highest recall
        in per cent, expected over a random order of equal captions, that any model can reach where an image must find
        the very caption of its own pair, and a caption the very image of its own. They say how much recalls that are
        computed that way can be worth; those of `retrieval_metrics` can always reach 100.
    """
    owner = np.unique(_as_keys(image_of_text), return_inverse=True)[1]
    _, text_of_row, copies = _group_texts(text_key, len(owner))
    image_of_link, text_of_link, rows_of_link = _link(owner, text_of_row)
    figures: dict[str, float] = {"repeated_captions": int(copies[np.bincount(text_of_link) > 1].sum())}
    if not figures["repeated_captions"]:
        return figures
    rank_in_text = _rank_within(text_of_link, -rows_of_link)
    for k in RECALL_AT:
        found = _find_among_first(copies[text_of_link], rows_of_link, k)
        best = np.zeros(image_of_link[-1] + 1)
        np.maximum.at(best, image_of_link, found)
        figures[f"image_to_text_own_ceiling@{k}"] = 100 * float(best.mean())
    for k in RECALL_AT:
        figures[f"text_to_image_own_ceiling@{k}"] = 100 * float(rows_of_link[rank_in_text < k].sum() / len(owner))
    return figures


def _find_among_first(size: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that one of `right` of `size` equal candidates is among the first k of a random order."""
    missed = np.ones(len(size))
    for place in range(k):
        missed *= np.clip((size - right - place) / np.maximum(size - place, 1), 0, 1)
    return 1 - missed


def _rank_within(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the place, from 0, of each value among those of its group in ascending order."""
    order = np.lexsort((value, group))
    starts = np.searchsorted(group[order], group[order])
    places = np.empty(len(group), dtype=np.int64)
    places[order] = np.arange(len(group)) - starts
    return places


def _group_texts(text_key: Any, num_texts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first row of each distinct caption, the caption of each row, and the number of rows of each."""
    if text_key is None:
        rows = np.arange(num_texts)
        return rows, rows, np.ones(num_texts, dtype=np.int64)
    keys = _as_keys(text_key)
    if keys.shape != (num_texts,):
        raise ValueError(f"text_key has shape {keys.shape}, but must be ({num_texts},): one key per caption.")
    _, first_row, text_of_row, copies = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    return first_row, text_of_row, copies


def _link(owner: np.ndarray, text_of_row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, distinct caption and number of rows of all that belong together, each once, sorted by image."""
    order = np.lexsort((text_of_row, owner))
    images, texts = owner[order], text_of_row[order]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(images) != 0) | (np.diff(texts) != 0)]))
    return images[starts], texts[starts], np.diff(starts, append=len(order))


def _as_keys(keys: Tensor | np.ndarray | list[Any]) -> np.ndarray:
    return keys.cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)


def _compute_cosines_of_links(
    images: Tensor, texts: Tensor, image_of_link: Tensor, text_of_link: Tensor, block_size: int
) -> Tensor:
    """Compute the cosine of each image with each of its captions, float64 `(num_links,)`."""
    blocks = zip(image_of_link.split(block_size), text_of_link.split(block_size), strict=True)
    return torch.cat([(normalize_rows(texts[j]) * normalize_rows(images[i])).sum(dim=1) for i, j in blocks])


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
