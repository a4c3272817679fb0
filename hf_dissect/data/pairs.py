"""Rows of any image-text table as numbered (image, caption) pairs, images left undecoded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from PIL import Image

from hf_dissect.data.images import UnusableImage, decode_image, image_content

IMAGE_COLUMNS = ("image", "image_features", "jpg", "img", "image_path")
CAPTION_COLUMNS = ("caption", "text", "captions")
CLEAN_COLUMNS = ("clean", "is_clean")

PAIR_KEYS = ("sample_id", "image_key", "caption_key", "bad_reason", "task_id", "is_clean")
"""Keys of a batch that describe the pairs and are no arguments of the model."""


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns a pair is made of; None where the table has no such column."""

    image: str
    caption: str
    sample_id: str | None = None
    task: str | None = None
    clean: str | None = None

    @classmethod
    def recognise(
        cls,
        available: Sequence[str],
        *,
        image: str | None = None,
        caption: str | None = None,
        sample_id: str | None = None,
        task: str | None = None,
        clean: str | None = None,
    ) -> "PairColumns":
        """Take the given names, else the usual ones.

        Raises:
            ValueError: a named column is not there, or no usual name is; the message lists what is.
        """
        given = {
            "image_column": image,
            "caption_column": caption,
            "id_column": sample_id,
            "task_column": task,
            "clean_column": clean,
        }
        for argument, name in given.items():
            if name is not None and name not in available:
                raise ValueError(f"{argument}={name!r}: no such column; the data has {', '.join(available)}.")
        return cls(
            image=image or _first(IMAGE_COLUMNS, available, "image_column"),
            caption=caption or _first(CAPTION_COLUMNS, available, "caption_column"),
            sample_id=sample_id,
            task=task,
            clean=clean or next((name for name in CLEAN_COLUMNS if name in available), None),
        )

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.sample_id, self.task, self.clean) if name]


def _first(names: Sequence[str], available: Sequence[str], argument: str) -> str:
    for name in names:
        if name in available:
            return name
    raise ValueError(
        f"No column named {' or '.join(names)}; the data has {', '.join(available) or 'no columns'}. "
        f"Name yours with {argument}=..."
    )


def key_hash(value: bytes | str) -> int:
    """Hash of a key, a caption or an image: 63 bits, so that it is a non-negative int64."""
    return xxhash.xxh3_64_intdigest(value.encode() if isinstance(value, str) else value) >> 1


class PairDataset(torch.utils.data.Dataset):
    """Map-style pairs of a `datasets.Dataset`: item i is a dict with `image`, `caption`, `sample_id`, and `task_id`
    and `is_clean` where the table has them.

    A row with a list of captions is as many pairs, numbered row by row; a row without a caption stays one (bad) pair,
    to
    be counted by the collator. Ids are the pair numbers, or come from the id column: integers as they are, strings by
    hash; of a row with several captions, pair j has the id `id * most captions + j` or the hash of `"id#j"`.

    Args:
        rows: the table.
        columns: which of its columns make a pair.

    Raises:
        ValueError: no rows; ids missing, negative, fractional or repeated; lists of captions and of truth differ.
    """

    def __init__(self, rows: datasets.Dataset, columns: PairColumns):
        if len(rows) == 0:
            raise ValueError("The data set has no rows.")
        self.columns = columns
        self.rows = _undecoded(rows, columns)
        self._pictures = _pictures(rows, columns)
        captions = _column(self.rows, columns.caption)
        self.several_captions = pa.types.is_list(captions.type) or pa.types.is_large_list(captions.type)
        if self.several_captions:
            counts = np.maximum(pc.fill_null(pc.list_value_length(captions), 0).to_numpy(), 1)
            self._row = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
            starts = np.cumsum(counts) - counts
            self._caption = (np.arange(len(self._row)) - starts[self._row]).astype(np.int16)
        else:
            self._row = self._caption = None
        self._task_ids = self._read_tasks()
        self.sample_ids = self._read_ids()

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, **names: str | None) -> "PairDataset":
        """Recognise the columns (see `PairColumns.recognise`) and wrap the table."""
        return cls(dataset, PairColumns.recognise(dataset.column_names, **names))

    @property
    def num_samples(self) -> int | None:
        """Number of pairs when the ids are the pair numbers, else None; what `SampleLedger` wants to know."""
        return len(self) if self.sample_ids is None else None

    @property
    def knows_truth(self) -> bool:
        return self.columns.clean is not None

    def __len__(self) -> int:
        return len(self.rows) if self._row is None else len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        indices = np.asarray(indices)
        rows = indices if self._row is None else self._row[indices]
        batch = self.rows[rows.tolist()]
        captions = batch[self.columns.caption]
        clean = batch[self.columns.clean] if self.columns.clean else None
        pairs = []
        for position, index in enumerate(indices.tolist()):
            pair = {
                "image": batch[self.columns.image][position],
                "caption": self._element(captions[position], index),
                "sample_id": index if self.sample_ids is None else int(self.sample_ids[index]),
            }
            if self._task_ids is not None:
                pair["task_id"] = int(self._task_ids[rows[position]])
            if clean is not None:
                pair["is_clean"] = bool(self._element(clean[position], index))
            pairs.append(pair)
        return pairs

    def find(self, sample_id: int) -> int:
        """Index of the pair with an id."""
        if self.sample_ids is None:
            return sample_id
        return int(np.flatnonzero(self.sample_ids == sample_id)[0])

    def picture(self, index: int) -> Image.Image | None:
        """The picture of a pair, RGB, for people to look at; None where there is none or it is damaged."""
        if self._pictures is None:
            return None
        row = index if self._row is None else int(self._row[index])
        try:
            return decode_image(self._pictures[row]["image"])
        except UnusableImage:
            return None

    def captions(self) -> Iterator[str]:
        """The captions that are strings, for training a tokenizer."""
        column = _column(self.rows, self.columns.caption)
        for value in column.to_pylist():
            yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))

    def _element(self, value: Any, index: int) -> Any:
        if not self.several_captions or not isinstance(value, list):
            return value
        place = self._caption[index]
        return value[place] if place < len(value) else None

    def _read_tasks(self) -> np.ndarray | None:
        if self.columns.task is None:
            return None
        values = _column(self.rows, self.columns.task)
        if values.null_count:
            raise ValueError(
                f"task_column={self.columns.task!r}: {values.null_count} rows have no task; name one each."
            )
        if pa.types.is_integer(values.type):
            return values.to_numpy()
        names = sorted(set(values.to_pylist()))
        return np.array([names.index(value) for value in values.to_pylist()])

    def _read_ids(self) -> np.ndarray | None:
        if self.columns.sample_id is None:
            return None
        name = self.columns.sample_id
        values = _column(self.rows, name)
        if values.null_count:
            raise ValueError(f"id_column={name!r}: {values.null_count} rows have no id; every row needs its own.")
        rows = np.arange(len(self.rows)) if self._row is None else self._row
        if pa.types.is_integer(values.type):
            ids = values.to_numpy().astype(np.int64)
            if (ids < 0).any():
                raise ValueError(f"id_column={name!r}: id {ids.min()} is negative; ids are integers from 0 upwards.")
            if self._row is not None:
                ids = ids[rows] * (int(self._caption.max()) + 1) + self._caption
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            keys = values.to_pylist()
            suffix = [""] * len(rows) if self._caption is None else [f"#{place}" for place in self._caption]
            ids = np.array([key_hash(keys[row] + end) for row, end in zip(rows, suffix, strict=True)], dtype=np.int64)
        else:
            raise ValueError(f"id_column={name!r} holds {values.type}; ids are integers or strings.")
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            repeated = unique[counts > 1]
            row = int(rows[np.flatnonzero(ids == repeated[0])[0]])
            raise ValueError(
                f"id_column={name!r}: {len(repeated)} ids are not unique, first {values[row].as_py()!r}; "
                "give each row an id of its own, or leave id_column out to number the rows."
            )
        return ids


class PairStream(torch.utils.data.IterableDataset):
    """Pairs of a streamed table, as `PairDataset` gives them; one row is read at a time.

    Ids must not depend on the order of reading: they are those of the id column or, without one, the hash of the
    image's content and the caption.
    """

    def __init__(self, rows: datasets.IterableDataset, columns: PairColumns):
        self.columns = columns
        self.rows = _undecoded(rows, columns)

    @classmethod
    def from_dataset(cls, dataset: datasets.IterableDataset, **names: str | None) -> "PairStream":
        """Recognise the columns (see `PairColumns.recognise`), reading the first row if the names are unknown."""
        available = dataset.column_names
        if available is None:
            first = next(iter(dataset.decode(False) if hasattr(dataset, "decode") else dataset), None)
            if first is None:
                raise ValueError("The data set has no rows.")
            available = list(first)
        return cls(dataset, PairColumns.recognise(available, **names))

    num_samples = None

    @property
    def knows_truth(self) -> bool:
        return self.columns.clean is not None

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield from self._pairs(row)

    def _pairs(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        captions, clean = row[self.columns.caption], row.get(self.columns.clean)
        several = isinstance(captions, list)
        for place, caption in enumerate((captions or [None]) if several else [captions]):
            pair = {"image": row[self.columns.image], "caption": caption}
            pair["sample_id"] = self._id(row, caption, place if several else None)
            if self.columns.task:
                pair["task_id"] = self._task(row[self.columns.task])
            if clean is not None:
                pair["is_clean"] = bool(clean[place] if isinstance(clean, list) else clean)
            yield pair

    def _id(self, row: Mapping[str, Any], caption: Any, place: int | None) -> int:
        if self.columns.sample_id is None:
            return key_hash((image_content(row[self.columns.image]) or b"") + str(caption).encode())
        key = row[self.columns.sample_id]
        if isinstance(key, int):
            if key < 0:
                raise ValueError(
                    f"id_column={self.columns.sample_id!r}: id {key} is negative; ids are integers from 0 upwards."
                )
            return key if place is None else key_hash(f"{key}#{place}")
        return key_hash(str(key) if place is None else f"{key}#{place}")

    def _task(self, value: Any) -> int:
        if isinstance(value, int):
            return value
        raise ValueError(
            f"task_column={self.columns.task!r} holds {value!r}; in a stream tasks must be integers, since their "
            "number is not known beforehand."
        )


def _undecoded(rows: Any, columns: PairColumns) -> Any:
    """Keep only the columns of a pair, and the image as it lies in the file."""
    rows = rows.select_columns(columns.names)
    features = rows.features
    if features is not None and isinstance(features.get(columns.image), datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    elif features is not None and isinstance(features.get(columns.image), datasets.List | datasets.LargeList):
        # A feature vector as a Python list of floats costs more than everything else in the collator.
        rows = rows.with_format("numpy", columns=[columns.image], output_all_columns=True)
    return rows


def _pictures(rows: datasets.Dataset, columns: PairColumns) -> datasets.Dataset | None:
    """The column of pictures as `image`, also when the model is trained on feature vectors made of them."""
    for name in (columns.image, *IMAGE_COLUMNS):
        kind = rows.features.get(name)
        if isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and name == columns.image):
            pictures = rows.select_columns([name])
            if name != "image":
                pictures = pictures.rename_column(name, "image")
            return pictures.cast_column("image", datasets.Image(decode=False))
    return None


def _column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns([name]).with_format("arrow")[:][name]


def as_pairs(dataset: Any, **names: str | None) -> PairDataset | PairStream | torch.utils.data.Dataset:
    """Wrap a table as pairs; what is wrapped already, or is a torch data set that yields pairs itself, stays.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list of dicts.
        names: column names, see `PairColumns.recognise`.

    Raises:
        TypeError: a `DatasetDict`, which needs a choice of split.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"Choose one split of the data set: {', '.join(dataset)}.")
    if isinstance(dataset, list):
        if not dataset:
            raise ValueError("The data set has no rows.")
        dataset = datasets.Dataset.from_list(dataset)
    if isinstance(dataset, datasets.Dataset):
        if len(dataset) == 0:
            raise ValueError("The data set has no rows.")
        return PairDataset.from_dataset(dataset, **names)
    if isinstance(dataset, datasets.IterableDataset):
        return PairStream.from_dataset(dataset, **names)
    return dataset
