"""Find the rows of a table that show the same picture, without decoding one."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image

from hf_dissect.data.arrow_columns import is_list, list_lengths
from hf_dissect.data.files import find_image_column
from hf_dissect.data.images import image_content
from hf_dissect.data.pair_columns import key_hash
from hf_dissect.data.stored_features import FEATURES_COLUMN

_ROWS_AT_ONCE = 1000


def number_pictures(dataset: Dataset, image_column: str | None = None) -> np.ndarray:
    """Give each row the number of its picture, the same for rows with the same picture.

    Two rows have the same picture if the content of a file, its path, or the stored features are equal in one of the
    columns of images. A picture that was saved once more, in another size or quality, is another one, and so is a
    copy in a file of its own where rows hold paths. A row without a picture has one of its own.

    Args:
        dataset: Rows.
        image_column: Column with the images; None recognises the usual names. Stored features and columns of
            pictures count in any case.

    Returns:
        int64 `(rows,)`, from 0.
    """
    named = (find_image_column(dataset, image_column), FEATURES_COLUMN)
    columns = [name for name, feature in dataset.features.items() if name in named or isinstance(feature, Image)]
    number = np.arange(len(dataset))
    for position, column in enumerate(columns):
        same = _number_contents(dataset, column)
        number = _join(number, same) if position else same
    return np.unique(number, return_inverse=True)[1].astype(np.int64)


def _number_contents(dataset: Dataset, column: str) -> np.ndarray:
    """Return a number of the content of each row, int64 `(rows,)`."""
    keys: list[int | None] = []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(_ROWS_AT_ONCE):
        values = batch[column]
        is_vector = is_list(values.type) and _is_number(values.type.value_type)
        contents = map(_vector_content, _split(values)) if is_vector else map(image_content, values.to_pylist())
        keys += [None if content is None else key_hash(content) for content in contents]
    missing = np.array([key is None for key in keys], dtype=bool)
    found = np.unique(np.array([key or 0 for key in keys], np.int64), return_inverse=True)[1]
    return np.where(missing, len(keys) + np.arange(len(keys)), found)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _split(lists: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the numbers of each list; Python lists of them would cost more than all else."""
    flat = pc.list_flatten(lists).to_numpy()
    return np.split(flat, np.cumsum(list_lengths(lists))[:-1]) if len(lists) else []


def _vector_content(vector: np.ndarray) -> bytes | None:
    """Return the bytes of stored features; None if they are missing or not usable."""
    return vector.tobytes() if len(vector) and np.isfinite(vector).all() else None


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the lowest row that each row is connected with, where equal numbers of either kind connect rows."""
    lowest = np.arange(len(first))
    while True:
        before = lowest
        for part in (np.unique(number, return_inverse=True)[1] for number in (first, second)):
            least = np.full(len(part), len(part))
            np.minimum.at(least, part, lowest)
            lowest = least[part]
        if np.array_equal(before, lowest):
            return lowest
