"""The losses of rows of logits, each row one pair's, in blocks of rows small enough to hold."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def softmax_rows(logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of each row.

    Args:
        logits: `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: column of the first row's true pair.
        mask: bool `(r, c)`, True where a column is no negative of the row; the true pair's own entry is ignored.

    Returns:
        `(r,)`, in at least single precision.
    """
    labels = torch.arange(len(logits), device=logits.device) + first
    if mask is not None:
        logits = logits.masked_fill(_off_diagonal(mask, labels), -torch.inf)
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def sigmoid_rows(logits: torch.Tensor, first: int | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over each row of the binary cross-entropies; arguments as of `softmax_rows`.

    `first` is None where all columns are other pairs.
    """
    logits = at_least_float32(logits)
    sign = -torch.ones_like(logits)
    if first is not None:
        rows = torch.arange(len(logits), device=logits.device)
        sign[rows, rows + first] = 1
        mask = None if mask is None else _off_diagonal(mask, rows + first)
    log_likelihood = F.logsigmoid(sign * logits)
    if mask is not None:
        log_likelihood = log_likelihood.masked_fill(mask, 0)
    return -log_likelihood.sum(-1)


def logits_of(rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`rows @ columns.T * scale + bias`, `(r, c)` from `(r, D)` and `(c, D)`, with no second array of that size."""
    return torch.addmm(bias.to(rows.dtype), rows * scale, columns.T)


def row_blocks(num_rows: int, num_columns: int, max_logits: int) -> Iterator[slice]:
    """Cut the rows so that a block has at most `max_logits` logits, and at least one row."""
    step = max(1, max_logits // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def losses_in_blocks(
    losses_of: Callable[[slice], torch.Tensor], num_rows: int, num_columns: int, max_logits: int
) -> torch.Tensor:
    """Losses `(num_rows,)` of blocks of rows (see `row_blocks`); of more than one block none is kept for the backward
    pass, which computes it again.

    Args:
        losses_of: losses `(r,)` of the rows of a slice; draws no random numbers.
    """
    blocks = list(row_blocks(num_rows, num_columns, max_logits))
    if len(blocks) > 1:
        losses_of = partial(checkpoint, losses_of, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([losses_of(rows) for rows in blocks])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or in single precision what has half of it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _off_diagonal(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return mask.scatter(1, labels[:, None], False)


def false_negatives(keys: torch.Tensor, other_keys: torch.Tensor) -> torch.Tensor:
    """Which pairs share an image or a caption: bool `(b, N)` from keys `(2, b)` and `(2, N)`, true pairs included."""
    return (keys[:, :, None] == other_keys[:, None, :]).any(0)
