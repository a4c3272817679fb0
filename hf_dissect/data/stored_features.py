"""Add precomputed features of images and captions, stored next to a data set, to its rows."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, List, Value

from hf_dissect.data.arrow_columns import is_list, lay_out_like, list_lengths, read_column, replace_column
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.images import is_feature_vector
from hf_dissect.data.pair_columns import CAPTION_COLUMNS, TEXT_FEATURES_COLUMN
from hf_dissect.data.split_files import summarize_error

FEATURES_COLUMN = "image_features"
_ROWS_TO_LOOK_AT = 100


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
    result = {}
    for split, rows, array, what in _read_arrays(splits, path, split_names, "data.image_features"):
        if not _is_matrix(array, len(rows)):
            raise ValueError(
                f"data.image_features: {what} is {array.dtype} of shape {array.shape}, but the split has "
                f"{len(rows)} rows: it must be numbers of shape ({len(rows)}, dim), rows in the order of the data set."
            )
        feature = List(Value("float32"), length=array.shape[1])
        result[split] = replace_column(rows, FEATURES_COLUMN, _to_vectors(array), feature)
    return result


def add_text_features(
    splits: Mapping[str, Dataset],
    path: Path,
    split_names: Mapping[str, str | None],
    caption_column: str | None = None,
) -> dict[str, Dataset]:
    """Add the arrays of a `.npz` file to the splits, as column `text_features` in the layout of the captions.

    Args:
        splits: Rows by split.
        path: File with one array `(captions, dim)` per split, named like the split: the captions of the first row in
            their order, then those of the second, and so on. A row whose list is empty has none.
        split_names: Name of "train", "validation" and "test" at the source.
        caption_column: Column with the captions; None recognises the usual names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is unreadable, there are no captions, or an array is missing or does not fit its split.
    """
    result = {}
    for split, rows, array, what in _read_arrays(splits, path, split_names, "data.text_features"):
        candidates = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        column = next((name for name in candidates if name in rows.column_names), None)
        if column is None:
            raise ValueError(
                f"data.text_features: split {split!r} has no column of captions, only {', '.join(rows.column_names)}; "
                "name it with data.caption_column."
            )
        captions = read_column(rows, column)
        several = is_list(captions.type)
        count = int(list_lengths(captions).sum()) if several else len(rows)
        if not _is_matrix(array, count):
            raise ValueError(
                f"data.text_features: {what} is {array.dtype} of shape {array.shape}, but the split has {count} "
                f"captions in {len(rows)} rows: it must be numbers of shape ({count}, dim), the captions of the first "
                "row first."
            )
        vector = List(Value("float32"), length=array.shape[1])
        values = lay_out_like(captions, _to_vectors(array))
        result[split] = replace_column(rows, TEXT_FEATURES_COLUMN, values, List(vector) if several else vector)
    return result


def find_feature_sizes(pairs: Any) -> dict[str, int]:
    """Find the dimensions of stored features in the first pairs.

    Args:
        pairs: Pairs with a length; a stream is not read ahead.

    Returns:
        Dimension of the images under `"vision"` and of the captions under `"text"`, where they are stored features.
    """
    sizes: dict[str, int] = {}
    for index in range(min(_ROWS_TO_LOOK_AT, len(pairs) if hasattr(pairs, "__len__") else 0)):
        pair = pairs[index]
        if is_feature_vector(pair["image"]):
            sizes.setdefault("vision", len(pair["image"]))
        if pair.get(TEXT_FEATURES_COLUMN) is not None:
            sizes.setdefault("text", len(pair[TEXT_FEATURES_COLUMN]))
        if len(sizes) == 2:
            break
    return sizes


def stack_text_features(rows: Sequence[Mapping[str, Any]], reasons: list[int], dim: int) -> torch.Tensor:
    """Stack the stored features of the captions, and mark the rows without usable ones.

    Args:
        rows: Pairs.
        reasons: Reason why each row cannot train, which is changed in place.
        dim: Dimension of the features.

    Returns:
        Features, float32 `(len(rows), dim)`, zero in unusable rows.

    Raises:
        ValueError: If the rows have no features, or of another dimension.
    """
    features = np.zeros((len(rows), dim), dtype=np.float32)
    for position, row in enumerate(rows):
        if TEXT_FEATURES_COLUMN not in row:
            raise ValueError(
                f"The model reads stored features of the captions, {dim} numbers each, and the rows have no "
                f"{TEXT_FEATURES_COLUMN}; name a .npz file with data.text_features (--text-features)."
            )
        vector = row[TEXT_FEATURES_COLUMN]
        if vector is not None and len(vector) != dim:
            raise ValueError(
                f"data.text_features: the captions have {len(vector)} numbers each, the model reads {dim}; name the "
                "features that the model was made for."
            )
        if vector is None or not np.isfinite(np.asarray(vector, np.float32)).all():
            reasons[position] = reasons[position] or BadReason.CAPTION_MISSING
        else:
            features[position] = vector
    return torch.from_numpy(features)


def _read_arrays(
    splits: Mapping[str, Dataset], path: Path, split_names: Mapping[str, str | None], setting: str
) -> Iterator[tuple[str, Dataset, np.ndarray, str]]:
    """Yield the name of each split, its rows, its array and words for that array."""
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: no file at {str(path)!r}. It names a .npz with one array per split.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{setting}: {str(path)!r} is not a readable .npz of numbers ({summarize_error(error)}). Write "
            "it with numpy.savez(path, train=..., validation=..., test=...)."
        ) from error
    for split, rows in splits.items():
        key = next((key for key in (split_names[split], split) if key in arrays), None)
        if key is None:
            raise ValueError(
                f"{setting}: {str(path)!r} has no array for the split {split_names[split]!r}, only "
                f"{list(arrays)}. Add one, or leave the split out (data.{split}_split: null)."
            )
        yield split, rows, arrays[key], f"array {key!r} of {str(path)!r}"


def _is_matrix(array: np.ndarray, count: int) -> bool:
    return array.ndim == 2 and array.shape[0] == count and np.issubdtype(array.dtype, np.number)


def _to_vectors(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.astype(np.float32).reshape(-1)), array.shape[1])
