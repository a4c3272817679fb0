"""Weights of pairs that the data give: read from a column, checked, and multiplied with those of a strategy."""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hf_dissect.data.arrow_columns import is_list, list_lengths
from hf_dissect.data.pair_keys import GIVEN_WEIGHT, WEIGHT_KEY

_WAY_OUT = "a weight is a finite number of at least 0. Mend the column, or leave weight_column out."
_LARGEST = float(np.finfo(np.float32).max)


def describe_weight_problem(value: Any) -> str | None:
    """Return what is wrong with a weight; None when nothing is."""
    if value is None:
        return "no weight"
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real | Decimal):
        return f"weight {type(value).__name__} {str(value)[:40]!r}, which is not a number"
    number = float(value)
    if number != number:
        return "weight NaN"
    if number < 0:
        return f"weight {number:g}, which is negative"
    return f"weight {number:g}, which is too large" if number > _LARGEST else None


def check_weight_type(name: str, kind: pa.DataType) -> pa.DataType:
    """Return the type of single weights in a column of numbers or lists of numbers.

    Args:
        name: Name of the column.
        kind: Type of the column.

    Raises:
        ValueError: If the column holds something else.
    """
    single = kind.value_type if is_list(kind) else kind
    if not (pa.types.is_integer(single) or pa.types.is_floating(single) or pa.types.is_decimal(single)):
        raise ValueError(f"weight_column={name!r} holds {kind}; {_WAY_OUT}")
    return single


def pick_weight(value: Any, place: int | None) -> Any:
    """Return the weight of a pair of a row: its entry in a list, or the value of the row.

    Args:
        value: Value of the column.
        place: Place of the pair's caption in a list of captions; None for a row of one caption.
    """
    if place is None or not isinstance(value, list):
        return value
    return value[place] if place < len(value) else None


def check_weights(name: str, weights: pa.ChunkedArray, captions: pa.ChunkedArray) -> None:
    """Check that every pair has a weight: one for a row, or a list parallel to its captions.

    Args:
        name: Name of the column.
        weights: Values of the column, one a row.
        captions: Captions of the rows.

    Raises:
        ValueError: If weights are of another type, missing, not finite, negative, or not parallel to the captions; the
            message names the first such row.
    """
    kind, several, way_out = check_weight_type(name, weights.type), is_list(weights.type), _WAY_OUT
    row_of_value = np.arange(len(weights))
    if several:
        if not is_list(captions.type):
            raise ValueError(f"weight_column={name!r} holds lists, but a row has one caption; {way_out}")
        wanted, given = list_lengths(captions), list_lengths(weights)
        wrong = np.flatnonzero((wanted != given) & (wanted > 0))  # a row without captions is one bad pair
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"weight_column={name!r}: row {row} has {given[row]} weights for {wanted[row]} captions; {way_out}"
            )
        row_of_value = np.repeat(row_of_value, given)
        weights = pa.chunked_array([chunk.flatten() for chunk in weights.chunks], kind)
    values = weights.cast(pa.float64()).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(~((values >= 0) & (values <= _LARGEST)))
    if len(wrong):
        value = weights[int(wrong[0])].as_py()
        raise ValueError(
            f"weight_column={name!r}: row {row_of_value[wrong[0]]} has {describe_weight_problem(value)} "
            f"({len(wrong)} such in all); {way_out}"
        )


def check_weighted(pairs: Any, column: str | None) -> None:
    """Check that training pairs which are a torch data set of their own, or were wrapped before, have the weights.

    Args:
        pairs: Training pairs, see `hf_dissect.data.as_pairs`.
        column: Column that the arguments name; None for no weights.

    Raises:
        ValueError: The column would not be read.
    """
    if column is None or getattr(getattr(pairs, "columns", None), WEIGHT_KEY, None) == column:
        return
    if hasattr(pairs, "columns"):
        raise ValueError(
            f"weight_column={column!r}: train_dataset was wrapped without it; pass weight={column!r} to as_pairs, or "
            "the table itself to the trainer."
        )
    if not hasattr(pairs, "__len__") or WEIGHT_KEY not in pairs[0]:
        raise ValueError(
            f"weight_column={column!r} would not be read: {type(pairs).__name__} makes its pairs itself. Let it give "
            f"each pair a number {WEIGHT_KEY!r} and leave weight_column out, or pass a table."
        )


def collate_weighted(rows: Sequence[Any], *, collator: Callable[[Sequence[Any]], Any]) -> Any:
    """Collate pairs that have weights by another collator, and check that the batch has the weights.

    Raises:
        ValueError: The collator drops the weights.
    """
    batch = collator(rows)
    check_collated(rows, batch)
    return batch


def check_collated(rows: Sequence[Any], batch: Mapping[str, Any]) -> None:
    """Check that a batch has the weights of its pairs, if they have any.

    Raises:
        ValueError: The collator drops the weights.
    """
    if isinstance(rows[0], Mapping) and WEIGHT_KEY in rows[0] and GIVEN_WEIGHT not in batch:
        raise ValueError(
            f"data_collator drops the weights of the pairs (weight_column): its batch has no {GIVEN_WEIGHT!r}. Call "
            f"hf_dissect.SelectionCollator in it, or return row[{WEIGHT_KEY!r}] of the rows as {GIVEN_WEIGHT!r}, "
            "float32 (B,)."
        )


def multiply_weights(
    chosen: torch.Tensor | None, given: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Multiply the weights of a strategy by those of the data.

    Args:
        chosen: Weights of the strategy `(k,)`; None for equal ones.
        given: Weights of the data `(k,)`; None for equal ones.
        device: Device of the product.

    Returns:
        Weights, float32 `(k,)`; None if both are None.
    """
    parts = [weights.to(device, torch.float32) for weights in (chosen, given) if weights is not None]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] * parts[1]
