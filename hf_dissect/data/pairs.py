"""Turn the rows of any image-text table into numbered (image, caption) pairs, with undecoded images."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hf_dissect.data.arrow_columns import is_list, list_lengths, read_chunked_column
from hf_dissect.data.cluster_balance import Balance
from hf_dissect.data.images import UnusableImage, decode_image
from hf_dissect.data.pair_columns import (
    CAPTION_COLUMNS,
    CLEAN_COLUMNS,
    IMAGE_COLUMNS,
    NO_ROWS,
    PairColumns,
    check_truth,
    find_truth_column,
    key_hash,
    make_pair_ids,
    read_task_numbers,
    select_undecoded,
)
from hf_dissect.data.pair_keys import PAIR_KEYS, ROW_KEYS, WEIGHT_KEY
from hf_dissect.data.pair_weights import check_weights
from hf_dissect.data.shards.skipped import read_description
from hf_dissect.data.streaming.pair_stream import PairStream
from hf_dissect.data.surrogates import is_unencodable
from hf_dissect.data.tables_in_memory import make_table
from hf_dissect.data.transformed_rows import TransformedRows, has_transform, recognise_transformed

__all__ = [
    "CAPTION_COLUMNS",
    "CLEAN_COLUMNS",
    "IMAGE_COLUMNS",
    "PAIR_KEYS",
    "ROW_KEYS",
    "PairColumns",
    "PairDataset",
    "PairStream",
    "as_pairs",
    "key_hash",
]

_CAPTIONS_AT_ONCE = 100_000


class PairDataset(torch.utils.data.Dataset):
    """Map-style pairs of a `datasets.Dataset`.

    Item i is a dict with `image`, `caption`, `sample_id`, and `task_id`, `is_clean` and `weight` where the table has
    them. A row with a list of captions gives one pair per caption, numbered row by row. A row without a caption gives
    one pair, which the collator counts as bad. Ids are the pair numbers, or come from the id column (see
    `make_pair_ids`); then, strings are in the item as `key`. A table with a transform (`with_transform`) gives what
    the transform returns.

    Args:
        rows: Table of images and captions.
        columns: Columns of the table that make a pair.

    Attributes:
        task_ids: Tasks of the rows, int64 `(rows,)`; None without tasks.
        task_names: Names of the tasks by number; None where the table itself has numbers.
        sample_ids: Ids of the pairs, int64 `(pairs,)`; None where the ids are the pair numbers.
        balance: `Balance` by which the training visits the pairs; None for each once an epoch.

    Raises:
        ValueError: If there are no rows; if ids are missing, negative, too large or repeated; if tasks or truths are
            missing or of a wrong type; if lists of captions and of truths differ in length.
    """

    balance: Balance | None = None

    def __init__(self, rows: datasets.Dataset, columns: PairColumns) -> None:
        if len(rows) == 0:
            raise ValueError(NO_ROWS)
        self.columns = columns
        self.rows = select_undecoded(rows, columns)
        self._transformed = TransformedRows(rows, columns) if has_transform(rows) else None
        self._pictures = _find_pictures(rows, columns)
        captions = read_captions(self.rows, columns)
        self.several_captions = is_list(captions.type)
        if self._transformed is not None:
            self.several_captions = self._transformed.check_several(self.several_captions)
            if not self.several_captions:
                captions = pa.chunked_array([pa.nulls(len(rows), pa.string())])
        self._row: np.ndarray | None = None
        self._caption: np.ndarray | None = None
        if self.several_captions:
            counts = np.maximum(list_lengths(captions), 1)
            self._row = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
            starts = np.cumsum(counts) - counts
            places = np.arange(len(self._row)) - starts[self._row]
            self._caption = places.astype(np.min_scalar_type(int(places.max())))
        self.task_ids: np.ndarray | None = None
        self.task_names: list[str] | None = None
        self.sample_ids: np.ndarray | None = None
        if columns.clean is not None:
            check_truth(columns.clean, read_chunked_column(self.rows, columns.clean), captions)
        if columns.weight is not None:
            check_weights(columns.weight, read_chunked_column(self.rows, columns.weight), captions)
        if columns.task is not None:
            self.task_ids, self.task_names = read_task_numbers(
                columns.task, read_chunked_column(self.rows, columns.task)
            )
            feature = self.rows.features[columns.task]
            if isinstance(feature, datasets.ClassLabel) and self.task_ids.min() >= 0:
                self.task_names = feature.names
        if columns.sample_id is not None:
            row = np.arange(len(rows)) if self._row is None else self._row
            values = read_chunked_column(self.rows, columns.sample_id)
            self.sample_ids = make_pair_ids(columns.sample_id, values, row, self._caption)
        # A feature vector as a Python list of floats would cost more than all else in the collator.
        schema = self.rows.data.schema
        vectors = [name for name in (columns.image, columns.text_features) if name in self.rows.column_names]
        vectors = [name for name in vectors if is_list(schema.field(name).type)]
        if vectors:
            self.rows = self.rows.with_format("numpy", columns=vectors, output_all_columns=True)
        self._read = self.rows
        if self._transformed is not None:
            kept = (columns.sample_id, columns.clean, columns.text_features, columns.weight)
            self._read = self.rows.select_columns([name for name in kept if name])

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, **names: str | None) -> "PairDataset":
        """Wrap a table, with columns named as in `PairColumns.recognise`."""
        if len(dataset) == 0:
            raise ValueError(NO_ROWS)
        if has_transform(dataset):
            return cls(dataset, recognise_transformed(dataset, **names))
        columns = PairColumns.recognise(dataset.column_names, **names)
        return cls(dataset, replace(columns, clean=find_truth_column(dataset, names.get("clean"))))

    @property
    def num_samples(self) -> int | None:
        """Number of pairs for a `SampleLedger` if the ids are the pair numbers; otherwise None."""
        return len(self) if self.sample_ids is None else None

    @property
    def knows_truth(self) -> bool:
        """True if each pair says whether its caption belongs to its image."""
        return self.columns.clean is not None

    @property
    def has_pictures(self) -> bool:
        """True if the table holds pictures, which a model that is trained on stored features does not need."""
        return self._pictures is not None

    @property
    def skipped_shards(self) -> dict[str, str]:
        """Shards that were not read to their end, with the reason."""
        return read_description(self.rows)

    @property
    def row_of_pair(self) -> np.ndarray:
        """Row of each pair in the table, int `(len(self),)`."""
        return np.arange(len(self.rows)) if self._row is None else self._row

    @property
    def place_of_pair(self) -> np.ndarray:
        """Place of each pair's caption among those of its row, int `(len(self),)`."""
        return np.zeros(len(self.rows), np.uint8) if self._caption is None else self._caption

    def __len__(self) -> int:
        return len(self.rows) if self._row is None else len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        numbers = np.asarray(indices)
        if numbers.min(initial=0) < 0:
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        rows = numbers if self._row is None else self._row[numbers]
        batch = self._read[rows.tolist()] if self._read.column_names else {}
        if self._transformed is not None:
            batch |= self._transformed.read(rows.tolist())
        columns = {
            "image": batch[self.columns.image],
            "caption": self._pick_by_pair(batch[self.columns.caption], numbers),
            "sample_id": (numbers if self.sample_ids is None else self.sample_ids[numbers]).tolist(),
        }
        if self.columns.sample_id is not None and isinstance(batch[self.columns.sample_id][0], str):
            columns["key"] = batch[self.columns.sample_id]
        if self.task_ids is not None:
            columns["task_id"] = self.task_ids[rows].tolist()
        if self.columns.clean is not None:
            columns["is_clean"] = list(map(bool, self._pick_by_pair(batch[self.columns.clean], numbers)))
        if self.columns.weight is not None:
            columns[WEIGHT_KEY] = self._pick_by_pair(batch[self.columns.weight], numbers)
        if self.columns.text_features is not None:
            columns["text_features"] = self._pick_by_pair(batch[self.columns.text_features], numbers)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def select(self, indices: np.ndarray) -> "PairDataset":
        """Return some of the pairs with their ids.

        Args:
            indices: Indices of the pairs, int `(n,)`.
        """
        chosen = copy.copy(self)
        chosen.__dict__.pop("_order", None)  # the cached order of the ids of all pairs
        chosen._row = self.row_of_pair[indices]
        chosen._caption = None if self._caption is None else self._caption[indices]
        chosen.sample_ids = np.asarray(indices) if self.sample_ids is None else self.sample_ids[indices]
        return chosen

    def number_tasks(self, names: Sequence[str]) -> None:
        """Renumber named tasks by their place in other names, such as those of the training data.

        Args:
            names: Names of tasks, by number.

        Raises:
            ValueError: If a task of these pairs is not among the names.
        """
        if self.task_ids is None or self.task_names is None or self.task_names == list(names):
            return
        place = {name: number for number, name in enumerate(names)}
        unknown = [
            self.task_names[number] for number in np.unique(self.task_ids) if self.task_names[number] not in place
        ]
        if unknown:
            raise ValueError(
                f"task_column={self.columns.task!r}: {unknown[0]!r} is not a task of the training, which are "
                f"{', '.join(names)}; drop these rows, or leave task_column out."
            )
        self.task_ids = np.array([place.get(name, -1) for name in self.task_names])[self.task_ids]
        self.task_names = list(names)

    def find(self, sample_id: int) -> int:
        """Return the index of the pair with an id.

        Raises:
            KeyError: If there is no such pair.
        """
        if self.sample_ids is None:
            index, found = sample_id, 0 <= sample_id < len(self)
        else:
            place = int(np.searchsorted(self.sample_ids, sample_id, sorter=self._order))
            index = int(self._order[min(place, len(self) - 1)])
            found = self.sample_ids[index] == sample_id
        if not found:
            raise KeyError(f"sample_id {sample_id}: no pair of the data set has this id.")
        return index

    def picture(self, index: int) -> Image.Image | None:
        """Return the picture of a pair, RGB, for people to look at; None if it is missing or damaged."""
        if self._pictures is None:
            return None
        row = index if self._row is None else int(self._row[index])
        try:
            return decode_image(self._pictures[row]["image"])
        except UnusableImage:
            return None

    def captions(self) -> Iterator[str]:
        """Yield the captions that are texts, for training a tokenizer."""
        column = read_captions(self.rows, self.columns)
        for start in range(0, len(column), _CAPTIONS_AT_ONCE):
            for value in column.slice(start, _CAPTIONS_AT_ONCE).to_pylist():
                texts = value if isinstance(value, list) else [value]
                yield from (text for text in texts if isinstance(text, str) and not is_unencodable(text))

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(np.asarray(self.sample_ids))

    def _pick_by_pair(self, values: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
        """Return one value a pair from one value or list a row; None where a row has no captions at all."""
        if self._caption is None:
            return values
        places = self._caption[indices].tolist()
        return [
            (value[place] if place < len(value) else None) if isinstance(value, list | tuple | np.ndarray) else value
            for value, place in zip(values, places, strict=True)
        ]


def read_captions(rows: datasets.Dataset, columns: PairColumns) -> pa.ChunkedArray:
    """Return the captions of a table, one or a list a row; nulls where only a transform makes captions."""
    if columns.caption in rows.column_names:
        return read_chunked_column(rows, columns.caption)
    return pa.chunked_array([pa.nulls(len(rows), pa.string())])


def _find_pictures(rows: datasets.Dataset, columns: PairColumns) -> datasets.Dataset | None:
    """Return the column of pictures as `image`, also if the model is trained on feature vectors made of them."""
    rows = rows.with_format(None)
    for name in (columns.image, *IMAGE_COLUMNS):
        kind = rows.features.get(name)
        if isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and name == columns.image):
            pictures = select_undecoded(rows, PairColumns(image=name, caption=name))
            return pictures if name == "image" else pictures.rename_column(name, "image")
    return None


def as_pairs(dataset: Any, **names: str | None) -> PairDataset | PairStream | torch.utils.data.Dataset:
    """Wrap a table as pairs; return a torch data set that yields pairs, wrapped or of its own, unchanged.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, a list of dicts, a data frame of pandas or polars, a
            `pa.Table`, or a torch data set.
        **names: Column names as in `PairColumns.recognise`.

    Raises:
        ValueError: If it is a `DatasetDict`, of which one split must be chosen; if it has no rows or its rows are not
            pairs; if columns are missing or unusable.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"A {type(dataset).__name__} holds several splits; pass one of them: {', '.join(map(repr, dataset))}."
        )
    if (table := make_table(dataset)) is not None:
        return PairDataset.from_dataset(table, **names)
    if isinstance(dataset, datasets.Dataset):
        return PairDataset.from_dataset(dataset, **names)
    if isinstance(dataset, datasets.IterableDataset):
        return PairStream.from_dataset(dataset, **names)
    if not isinstance(dataset, PairDataset | torch.utils.data.IterableDataset):
        _check_yields_pairs(dataset)
    return dataset


def _check_yields_pairs(dataset: Any) -> None:
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"{type(dataset).__name__} is not a data set; pass a datasets.Dataset, a list of dicts, or a torch "
            "data set."
        )
    if len(dataset) == 0:
        raise ValueError(NO_ROWS)
    first = dataset[0]
    if not isinstance(first, Mapping) or (missing := [key for key in ROW_KEYS if key not in first]):
        found = f"without {', '.join(missing)}" if isinstance(first, Mapping) else type(first).__name__
        raise ValueError(
            f"{type(dataset).__name__} yields {found}; a torch data set yields dicts with {', '.join(ROW_KEYS)} "
            "(a unique integer of at least 0). A datasets.Dataset or a list of dicts needs no ids."
        )
