"""The losses of rows of logits, one row per pair, in blocks of rows that fit into memory."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def softmax_losses(logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the cross-entropy of each row.

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; the entry of the true pair is ignored.

    Returns:
        Losses `(r,)`, in at least single precision.
    """
    logits = mask_negatives(logits, first, mask)
    labels = torch.arange(len(logits), device=logits.device) + first
    return F.cross_entropy(promote_to_float32(logits), labels, reduction="none")


def mask_negatives(logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Return logits `(r, c)` with `-inf` where `mask` is True, except for the true pairs; see `softmax_losses`."""
    if mask is None:
        return logits
    labels = torch.arange(len(logits), device=logits.device) + first
    return logits.masked_fill(exclude_negatives(mask, labels), -torch.inf)


def smoothed_softmax_losses(
    logits: torch.Tensor, first: int, mask: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Compute the cross-entropy of each row with a target that is partly uniform, and the one without (`(r, 2)`).

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; the entry of the true pair is ignored.
        smoothing: Share of the target that is uniform over the columns, in [0, 1).

    Returns:
        Smoothed losses and losses `(r, 2)`, in at least single precision.
    """
    logits = promote_to_float32(logits)
    labels = torch.arange(len(logits), device=logits.device) + first
    own = logits.gather(1, labels[:, None])[:, 0]
    if mask is None:
        normaliser, mean = logits.logsumexp(1), logits.mean(1)
    else:
        excluded = exclude_negatives(mask, labels)
        normaliser = logits.masked_fill(excluded, -torch.inf).logsumexp(1)
        mean = logits.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
    return torch.stack([normaliser - torch.lerp(own, mean, smoothing), normaliser - own], dim=1)


def sigmoid_losses(logits: torch.Tensor, first: int | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the sum over each row of the binary cross-entropies.

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair; None if all columns are other pairs.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; the entry of the true pair is ignored.

    Returns:
        Losses `(r,)`, in at least single precision.
    """
    logits = promote_to_float32(logits)
    sign = -torch.ones_like(logits)
    if first is not None:
        rows = torch.arange(len(logits), device=logits.device)
        sign[rows, rows + first] = 1
        mask = None if mask is None else exclude_negatives(mask, rows + first)
    log_likelihood = F.logsigmoid(sign * logits)
    if mask is not None:
        log_likelihood = log_likelihood.masked_fill(mask, 0)
    return -log_likelihood.sum(-1)


def compute_logits(rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute `rows @ columns.T * scale + bias` without a second array of that size.

    Args:
        rows: Embeddings `(r, D)`.
        columns: Embeddings `(c, D)`.
        scale: Factor, a scalar.
        bias: Summand, a scalar.

    Returns:
        Logits `(r, c)`.
    """
    return torch.addmm(bias.to(rows.dtype), rows * scale, columns.T)


def split_rows(num_rows: int, num_columns: int, max_logits: int) -> Iterator[slice]:
    """Split rows into blocks of at most `max_logits` logits, but at least one row.

    Args:
        num_rows: Number of rows.
        num_columns: Number of logits in a row.
        max_logits: Largest number of logits in a block.
    """
    step = max(1, max_logits // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def compute_losses_in_blocks(
    losses_of: Callable[[slice], torch.Tensor], num_rows: int, num_columns: int, max_logits: int
) -> torch.Tensor:
    """Compute losses in blocks of rows (see `split_rows`).

    If there is more than one block, no block is kept: the backward pass computes each of them again.

    Args:
        losses_of: Function from a slice of rows to their losses `(r,)`; it must not draw random numbers.
        num_rows: Number of rows.
        num_columns: Number of logits in a row.
        max_logits: Largest number of logits in a block.

    Returns:
        Losses `(num_rows,)`.
    """
    blocks = list(split_rows(num_rows, num_columns, max_logits))
    if len(blocks) > 1:
        losses_of = partial(checkpoint, losses_of, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([losses_of(rows) for rows in blocks])


def promote_to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a half-precision tensor to single precision, and return any other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def exclude_negatives(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a mask `(r, c)` that is False for the true pairs, whose columns are `labels` int64 `(r,)`."""
    return mask.scatter(1, labels[:, None], False)


def find_false_negatives(keys: torch.Tensor, other_keys: torch.Tensor) -> torch.Tensor:
    """Compare the pairs of a rank with others by their images and captions.

    Args:
        keys: Image and caption of each pair, int64 `(2, b)`.
        other_keys: Image and caption of the pairs to compare with, int64 `(2, N)`.

    Returns:
        Bool `(b, N)`, True where two pairs share an image or a caption; true pairs are included.
    """
    return (keys[:, :, None] == other_keys[:, None, :]).any(0)
