"""Add precomputed image features, stored next to a data set, to its rows."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value

from hf_dissect.data.arrow_columns import replace_column
from hf_dissect.data.split_files import summarize_error

FEATURES_COLUMN = "image_features"


def add_image_features(
    splits: Mapping[str, Dataset], path: Path, split_names: Mapping[str, str | None]
) -> dict[str, Dataset]:
    """Add the arrays of a `.npz` file to the splits, as float32 column `image_features`.

    Args:
        splits: Rows by split.
        path: File with one array `(rows, dim)` per split, named like the split.
        split_names: Name of "train", "validation" and "test" at the source.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is unreadable, or an array is missing or does not fit its split.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"data.image_features: no file at {str(path)!r}. It names a .npz with one array per split."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"data.image_features: {str(path)!r} is not a readable .npz of numbers ({summarize_error(error)}). Write "
            "it with numpy.savez(path, train=..., validation=..., test=...)."
        ) from error
    result = {}
    for split, rows in splits.items():
        key = next((key for key in (split_names[split], split) if key in arrays), None)
        if key is None:
            raise ValueError(
                f"data.image_features: {str(path)!r} has no array for the split {split_names[split]!r}, only "
                f"{list(arrays)}. Add one, or leave the split out (data.{split}_split: null)."
            )
        result[split] = _add_features(rows, arrays[key], f"array {key!r} of {str(path)!r}")
    return result


def _add_features(rows: Dataset, array: np.ndarray, what: str) -> Dataset:
    if array.ndim != 2 or array.shape[0] != len(rows) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(
            f"data.image_features: {what} is {array.dtype} of shape {array.shape}, but the split has "
            f"{len(rows)} rows: it must be numbers of shape ({len(rows)}, dim), rows in the order of the data set."
        )
    dim = array.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(array.astype(np.float32).reshape(-1)), dim)
    return replace_column(rows, FEATURES_COLUMN, column, List(Value("float32"), length=dim))
