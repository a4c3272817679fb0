"""Reading and replacing one column of a data set without touching the others, as these hold the pictures."""

import pyarrow as pa
from datasets import Dataset
from datasets.features.features import FeatureType

_NEW_COLUMN = "__new_column__"


def read_column(dataset: Dataset, name: str) -> pa.Array:
    """The values of all rows, in the order of the data set; `pa.ChunkedArray` only where they do not fit one array."""
    values = dataset.select_columns(name).with_format("arrow")[:][name]
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def replace_column(dataset: Dataset, name: str, values: pa.Array, feature: FeatureType) -> Dataset:
    """The data set with a new column in the place of the one of that name, or as the last one if there is none."""
    names = dataset.column_names if name in dataset.column_names else [*dataset.column_names, name]
    # Added before the old one goes: a dataset without columns has no rows to add to.
    added = dataset.add_column(_NEW_COLUMN, values, feature=feature)
    if name in dataset.column_names:
        added = added.remove_columns(name)
    return added.rename_column(_NEW_COLUMN, name).select_columns(names)
