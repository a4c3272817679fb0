"""Validation of embeddings, shared by all metrics so that they refuse the same inputs and agree on ties."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

EmbeddingsLike = Tensor | np.ndarray | list[Any]

# Cosines of float32 embeddings differ by 6e-8 at best. They are compared in float64, whose rounding depends on the
# block that a pair belongs to; a smaller difference than this is a tie.
TIE_TOLERANCE = 1e-9


def as_embeddings(name: str, values: EmbeddingsLike, device: torch.device | None = None) -> Tensor:
    """Check embeddings and return them as a detached tensor.

    Args:
        name: Name of the argument, with which errors begin.
        values: Embeddings `(rows, dim)` of any real type and any scale.
        device: Device of the result; None to leave a tensor where it is.

    Returns:
        Embeddings `(rows, dim)`.

    Raises:
        ValueError: If the values are not a matrix, are empty, or hold NaN or infinite numbers.
    """
    try:
        embeds = torch.as_tensor(np.asarray(values) if isinstance(values, list) else values, device=device).detach()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a (rows, dim) matrix of numbers; check that all rows have one length ({error})"
        ) from None
    if embeds.ndim != 2 or 0 in embeds.shape:
        raise ValueError(f"{name} has shape {tuple(embeds.shape)}, but must be (rows, dim) with at least one of each.")
    if embeds.device.type == "mps":
        embeds = embeds.cpu()  # Apple's GPU lacks float64, in which the cosines are compared.
    bad_rows = (~torch.isfinite(embeds).all(dim=1)).nonzero().flatten()
    if len(bad_rows):
        raise ValueError(
            f"{name} holds NaN or infinite numbers in {len(bad_rows)} of {len(embeds)} rows, first in row "
            f"{int(bad_rows[0])}: the model diverged, or overflowed in half precision."
        )
    return embeds


def check_same_dim(name: str, embeds: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two matrices of embeddings have the same number of dimensions.

    Args:
        name: Name of the first argument.
        embeds: Embeddings `(n, dim)`.
        other_name: Name of the second argument.
        other: Embeddings `(m, dim)`.
    """
    if embeds.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has {embeds.shape[1]} dimensions and {other_name} has {other.shape[1]}: "
            "both must come from the same model, after its projections."
        )


def check_positive_integer(name: str, value: int) -> None:
    """Raise a ValueError unless a value is an integer of at least 1.

    Args:
        name: Name of the argument.
        value: Value to check.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1.")


def normalize_rows(embeds: Tensor) -> Tensor:
    """Scale the rows of `(rows, dim)` to length 1, in float64; a row of zeros stays zero."""
    return normalize(embeds.double(), dim=1)
