"""Checks embeddings in one place, so that every figure refuses the same inputs and means the same by a tie."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

# Cosines of float32 embeddings differ by 6e-8 at best. They are compared in float64, whose own rounding depends on
# the block a pair falls into; anything nearer than this is the same cosine, and a tie.
TIE_TOLERANCE = 1e-9


def as_embeddings(name: str, values: Tensor | np.ndarray | list, device: torch.device | None = None) -> Tensor:
    """Returns `values` as a detached `(rows, dim)` tensor after checking it.

    Args:
        name: What the caller calls this argument; errors begin with it.
        values: `(rows, dim)` embeddings, of any real dtype and any scale.
        device: Where the tensor shall be; None leaves a tensor where it is.

    Raises:
        ValueError: If it is no matrix, is empty, or holds NaN or infinite numbers.
    """
    try:
        embeds = torch.as_tensor(np.asarray(values) if isinstance(values, list) else values, device=device).detach()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a (rows, dim) matrix of numbers; rows of unequal length? ({error})"
        ) from None
    if embeds.ndim != 2 or 0 in embeds.shape:
        raise ValueError(f"{name} has shape {tuple(embeds.shape)}, but must be (rows, dim) with at least one of each.")
    if embeds.device.type == "mps":
        embeds = embeds.cpu()  # Apple's GPU has no float64, in which the cosines are compared.
    bad_rows = (~torch.isfinite(embeds).all(dim=1)).nonzero().flatten()
    if len(bad_rows):
        raise ValueError(
            f"{name} holds NaN or infinite numbers in {len(bad_rows)} of {len(embeds)} rows, first in row "
            f"{int(bad_rows[0])}: the model diverged, or overflowed in half precision."
        )
    return embeds


def check_same_dim(name: str, embeds: Tensor, other_name: str, other: Tensor) -> None:
    """Raises `ValueError` unless `embeds` `(n, dim)` and `other` `(m, dim)` live in one space."""
    if embeds.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has {embeds.shape[1]} dimensions and {other_name} has {other.shape[1]}: "
            "both must come from the same model, after its projections."
        )


def check_positive_integer(name: str, value: int) -> None:
    """Raises `ValueError` unless the argument called `name` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1.")


def unit_rows(embeds: Tensor) -> Tensor:
    """`(rows, dim)` -> the same in float64 with rows of length 1; a row of zeros stays zero."""
    return normalize(embeds.double(), dim=1)
