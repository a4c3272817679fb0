"""Mismatch captions on purpose and record the truth, so that a selection rule can be judged against it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, LargeList, List, Value

from hf_dissect.data.arrow_columns import is_list, lay_out_like, list_lengths, read_column, replace_column
from hf_dissect.data.pair_columns import (
    CAPTION_COLUMNS,
    CLEAN_COLUMNS,
    TEXT_FEATURES_COLUMN,
    find_truth_column,
    find_usual_caption_column,
)

_REPAIR_ROUNDS = 200


def shuffle_captions(
    dataset: Dataset,
    *,
    rate: float,
    seed: int = 0,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Give a share of the pairs the caption of another row and record which pairs these are.

    Exactly `round(rate * num_pairs)` pairs are mismatched. They exchange captions among each other, so that no caption
    is lost or repeated. Pairs are numbered row by row, and within a row in the order of its captions.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        rate: Share of the pairs to mismatch, in [0, 1].
        seed: The same seed gives the same noise.
        caption_column: Column with the captions; None recognises `caption`, `text` and `captions`.
        clean_column: Column for the truth, `clean` if None. A truth that is already there is kept for captions
            that stay in their row.

    Returns:
        The dataset with the captions exchanged and the truth as bool, or as list of bool parallel to the captions:
        True where the caption belongs to the image. Other columns, images included, are shared with the input.

    Raises:
        ValueError: If the rate is impossible on this dataset, or there is no caption column.
    """
    check_rate_and_seed(rate, seed)
    column = find_caption_column(dataset, caption_column)
    row_of_pair = find_row_of_pair(read_column(dataset, column))
    order = _exchange_between_rows(row_of_pair, round(rate * len(row_of_pair)), np.random.default_rng(seed))
    return apply_caption_order(dataset, order, caption_column=column, clean_column=clean_column)


def apply_caption_order(
    dataset: Dataset,
    order: np.ndarray,
    *,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Give pair i the caption of pair `order[i]` and record which pairs that mismatches.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        order: Integer array `(num_pairs,)`, a permutation of the pair numbers, which run row by row.
        caption_column: Column with the captions; None recognises `caption`, `text` and `captions`.
        clean_column: Column for the truth, `clean` if None; see `shuffle_captions`.

    Returns:
        The dataset with reordered captions; the truth is True where `order[i]` is a pair of the same row as i.

    Raises:
        ValueError: If `order` is not a permutation of this dataset's pairs, or there is no caption column.
    """
    column = find_caption_column(dataset, caption_column)
    captions = read_column(dataset, column)
    row_of_pair = find_row_of_pair(captions)
    order = _check_order(order, len(row_of_pair))
    truth = row_of_pair[order] == row_of_pair
    return record_truth(move_captions(dataset, column, order), captions, truth, order, clean_column)


def move_captions(dataset: Dataset, column: str, order: np.ndarray) -> Dataset:
    """Give pair i the caption of pair `order[i]`, and its stored features.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        column: Column with the captions.
        order: Pair that each caption comes from, int64 `(num_pairs,)`; pairs may occur any number of times.
    """
    captions = read_column(dataset, column)
    moved = dataset
    for name in (column, TEXT_FEATURES_COLUMN):
        if name in dataset.column_names:
            values = read_column(dataset, name)
            flat = values.flatten() if is_list(captions.type) else values
            moved = replace_column(
                moved, name, lay_out_like(captions, flat.take(pa.array(order))), dataset.features[name]
            )
    return moved


def record_truth(
    dataset: Dataset, captions: pa.Array, truth: np.ndarray, order: np.ndarray, clean_column: str | None = None
) -> Dataset:
    """Write which captions belong to their images, next to what the data set knows of them already.

    Args:
        dataset: Rows whose captions were changed.
        captions: Captions before the change, whose layout the truth takes.
        truth: Truth of the change, bool `(num_pairs,)`.
        order: Pair that each caption comes from, int64 `(num_pairs,)`.
        clean_column: Column for the truth, see `shuffle_captions`.
    """
    # A column of that name that holds something else stays what it is.
    free = [name for name in CLEAN_COLUMNS if name not in dataset.column_names]
    column = find_truth_column(dataset, clean_column) or (free[0] if free else CLEAN_COLUMNS[0])
    values = pa.array(truth)
    if column in dataset.column_names:
        known = read_truth(dataset, column, find_row_of_pair(captions))
        values = pc.and_kleene(values, known.take(pa.array(order)))
    feature = List(Value("bool")) if is_list(captions.type) else Value("bool")
    return replace_column(dataset, column, lay_out_like(captions, values), feature)


def check_rate_and_seed(rate: float, seed: int) -> None:
    """Check the share and the seed of captions that are changed on purpose.

    Raises:
        ValueError: If one of them is out of its range.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate (noise_rate) must be a number between 0 and 1, got {rate!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed (noise_seed) must be an integer of at least 0, got {seed!r}.")


def load_caption_order(path: str | Path) -> np.ndarray:
    """Read a permutation of captions from a `.npy` file.

    Returns:
        int64 array `(num_pairs,)`; `apply_caption_order` checks it against the dataset.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a one-dimensional integer array in NumPy's format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"noise_permutation: no file at {str(path)!r}. It must name a .npy file with one integer per pair "
            "(numpy.save); leave it out for no permutation."
        )
    try:
        order = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"noise_permutation: {str(path)!r} is not a readable .npy file of numbers ({error}). Write it with "
            "numpy.save."
        ) from error
    if not isinstance(order, np.ndarray) or order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
        found = f"{order.dtype} {order.shape}" if isinstance(order, np.ndarray) else f"an archive of {list(order)}"
        raise ValueError(
            f"noise_permutation: {str(path)!r} must hold one integer array of shape (num_pairs,), found {found}."
        )
    return order.astype(np.int64)


def find_caption_column(dataset: Dataset, caption_column: str | None = None) -> str:
    """Return the caption column's name: the given one, or else the first of `caption`, `text` and `captions` there.

    Raises:
        ValueError: If there is no such column, or the dataset is streaming, where captions cannot be exchanged.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "dataset is streaming: captions can only be exchanged when all rows are at hand. Load it with "
            "streaming=False, or store the mismatched captions in the data."
        )
    found = find_usual_caption_column(dataset.column_names) if caption_column is None else caption_column
    if found is None or found not in dataset.column_names:
        raise ValueError(
            f"caption_column: {caption_column!r} names no column of the dataset, which has {dataset.column_names}. "
            f"Name the column that holds the captions, or call it one of {list(CAPTION_COLUMNS)}."
        )
    kind = dataset.features[found]
    if isinstance(kind, List | LargeList):
        kind = kind.feature
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string"):
        raise ValueError(
            f"caption_column: {found!r} holds {dataset.features[found]}; captions are strings or lists of strings."
        )
    return found


def _exchange_between_rows(row_of_pair: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a permutation `(num_pairs,)` that moves exactly `count` captions, each to another row."""
    order = np.arange(len(row_of_pair))
    if count == 0:
        return order
    chosen = rng.choice(len(row_of_pair), size=count, replace=False)
    source = rng.permutation(chosen)
    for _ in range(_REPAIR_ROUNDS):
        stuck = np.flatnonzero(row_of_pair[chosen] == row_of_pair[source])
        if not len(stuck):
            break
        for position, other in zip(stuck, rng.integers(count, size=len(stuck)), strict=True):
            source[[position, other]] = source[[other, position]]
    else:
        # Few rows with many pairs each: random swaps may not succeed; a rotation by the largest row does if any does.
        chosen = chosen[np.argsort(row_of_pair[chosen], kind="stable")]
        largest = np.bincount(row_of_pair[chosen]).max()
        if 2 * largest > count:
            raise ValueError(
                f"rate (noise_rate): {count} of {len(row_of_pair)} pairs cannot all receive the caption of "
                "another row: "
                f"{largest} of them belong to one row. Use rate 0, a higher rate, or a dataset with more rows."
            )
        source = np.roll(chosen, -largest)
    order[chosen] = source
    return order


def _check_order(order: np.ndarray, num_pairs: int) -> np.ndarray:
    """Return the order as int64 if it is a permutation of the pair numbers.

    Raises:
        ValueError: If it is not.
    """
    order = np.asarray(order)
    if order.shape != (num_pairs,) or not (np.issubdtype(order.dtype, np.integer) or num_pairs == 0):
        raise ValueError(
            f"order (noise_permutation) is {order.dtype} of shape {order.shape}, but the dataset has {num_pairs} "
            f"pairs: it must be an integer array of shape ({num_pairs},), made for the whole train split."
        )
    order = order.astype(np.int64)
    outside = np.flatnonzero((order < 0) | (order >= num_pairs))
    if len(outside):
        raise ValueError(
            f"order (noise_permutation) names pair {order[outside[0]]} at position {outside[0]}; pairs are numbered 0 "
            f"to {num_pairs - 1}."
        )
    repeated = np.flatnonzero(np.bincount(order, minlength=num_pairs) > 1)
    if len(repeated):
        raise ValueError(
            f"order (noise_permutation) is not a permutation: pair {repeated[0]} occurs more than once. Each pair "
            "number must occur exactly once."
        )
    return order


def read_truth(dataset: Dataset, column: str, row_of_pair: np.ndarray) -> pa.Array:
    """Return the truth that the data set holds already, bool, one a pair.

    Raises:
        ValueError: If the column does not hold one bool per caption.
    """
    truth = read_column(dataset, column)
    if not np.array_equal(find_row_of_pair(truth), row_of_pair):
        raise ValueError(
            f"clean_column: {column!r} must hold one bool per caption, in the same layout as the captions "
            f"(a list where those are lists); it holds {dataset.features[column]}."
        )
    flat = truth.flatten() if is_list(truth.type) else truth
    if not (pa.types.is_boolean(flat.type) or pa.types.is_integer(flat.type)):
        raise ValueError(f"clean_column: {column!r} must hold bools, it holds {dataset.features[column]}.")
    return flat.cast(pa.bool_())


def find_row_of_pair(captions: pa.Array) -> np.ndarray:
    """Return the row number of each pair, int64 `(num_pairs,)`."""
    rows = np.arange(len(captions))
    return np.repeat(rows, list_lengths(captions)) if is_list(captions.type) else rows
