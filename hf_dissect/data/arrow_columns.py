"""Read or replace one column of a data set without copying the others, since those hold the pictures."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.features.features import FeatureType

_NEW_COLUMN = "__new_column__"


def read_column(dataset: Dataset, name: str) -> pa.Array:
    """Return the values of all rows in order, as a `pa.ChunkedArray` only if they do not fit into one array."""
    values = dataset.select_columns(name).with_format("arrow")[:][name]
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def read_chunked_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Return the values of all rows in order, in the chunks in which the data set stores them."""
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def replace_column(dataset: Dataset, name: str, values: pa.Array, feature: FeatureType) -> Dataset:
    """Return the data set with new values in the named column, which becomes the last column if it is new."""
    names = dataset.column_names if name in dataset.column_names else [*dataset.column_names, name]
    # Added before the old one goes: a dataset without columns has no rows to add to.
    added = dataset.add_column(_NEW_COLUMN, values, feature=feature)
    if name in dataset.column_names:
        added = added.remove_columns(name)
    return added.rename_column(_NEW_COLUMN, name).select_columns(names)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's three list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_lengths(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the length of each list, int64 `(rows,)`; a missing list has length 0."""
    return pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)


def lay_out_like(lists: pa.Array, flat: pa.Array) -> pa.Array:
    """Return values, one for each element of the lists, in the layout of the lists; unchanged if those are none."""
    if not is_list(lists.type):
        return flat
    offsets = np.concatenate([[0], np.cumsum(list_lengths(lists))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
