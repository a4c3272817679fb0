"""Images with labels from a table of any columns, checked before a model reads one of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from hf_dissect.data.arrow_columns import is_list
from hf_dissect.data.pair_columns import IMAGE_COLUMNS, PairColumns
from hf_dissect.data.pairs import PairDataset

LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target")


def find_label_column(column_names: Sequence[str], label_column: str | None = None) -> str | None:
    """Return the given name, or else the first of `LABEL_COLUMNS` that is a column; None if there is none."""
    return label_column or next((name for name in LABEL_COLUMNS if name in column_names), None)


class LabelledImages:
    """Images of a table, undecoded, with the positions of their labels among the names of the classes.

    Args:
        dataset: Rows of an image column and a label column, see `evaluate_zero_shot`.
        class_names: Distinct names of the classes.
        image_column: Name of the image column; None recognises the usual names.
        label_column: Name of the label column; None recognises the usual names.
        task_column: Name of the column of the tasks; None if there is none.

    Attributes:
        image_column: Name of the image column.
        label_column: Name of the label column.
        labels: Position of each row's label among the class names, int64 `(rows,)`.
        pairs: `PairDataset` whose captions are the labels, for its images and tasks.

    Raises:
        TypeError: If `dataset` is not a `datasets.Dataset`.
        ValueError: If columns are missing or unusable, the table is empty, or labels are outside of `class_names`.
    """

    def __init__(
        self,
        dataset: Dataset,
        class_names: Sequence[str],
        image_column: str | None = None,
        label_column: str | None = None,
        task_column: str | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}, but must be a datasets.Dataset: choose one split, "
                "and take(n) rows of a stream into Dataset.from_list."
            )
        self.image_column = _find_column(dataset, "image_column", image_column, IMAGE_COLUMNS)
        self.label_column = _find_column(dataset, "label_column", label_column, LABEL_COLUMNS)
        if task_column is not None:
            _find_column(dataset, "task_column", task_column, ())
        _check_images(dataset, self.image_column)
        if len(dataset) == 0:
            raise ValueError("dataset is empty; give one with at least one row.")
        self.labels = _find_positions(dataset.with_format(None), self.label_column, class_names)
        columns = PairColumns(self.image_column, caption=self.label_column, task=task_column)
        self.pairs = PairDataset(dataset.with_format(None), columns)

    def __len__(self) -> int:
        return len(self.labels)

    def read_images(self, rows: Sequence[int]) -> list[Any]:
        """Return the images of some rows, as files or as feature vectors."""
        return [pair["image"] for pair in self.pairs.__getitems__(rows)]


def _find_column(dataset: Dataset, argument: str, name: str | None, usual: Sequence[str]) -> str:
    found = name or next((column for column in usual if column in dataset.column_names), None)
    columns = ", ".join(dataset.column_names) or "no columns"
    if found is None:
        raise ValueError(f"No column named {' or '.join(usual)}; the dataset has {columns}. Name yours by {argument}.")
    if found not in dataset.column_names:
        raise ValueError(f"{argument} is {found!r}, but the dataset has {columns}.")
    return found


def _check_images(dataset: Dataset, image_column: str) -> None:
    feature = dataset.features[image_column]
    holds_paths = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")
    if not (isinstance(feature, Image) or holds_paths or is_list(dataset.data.schema.field(image_column).type)):
        raise ValueError(
            f"image_column {image_column!r} holds {feature}, but must hold pictures (a datasets.Image, paths or "
            "bytes) or feature vectors; name the column of the images."
        )


def _find_positions(dataset: Dataset, label_column: str, class_names: Sequence[str]) -> np.ndarray:
    """Return the position in `class_names` of each row's label, int64 `(num_rows,)`."""
    feature = dataset.features[label_column]
    if not isinstance(feature, (ClassLabel, Value)):
        raise ValueError(f"label_column {label_column!r} holds {feature}, but must hold one label for each image.")
    labels = list(dataset[label_column])
    position = {name: index for index, name in enumerate(class_names)}
    if isinstance(feature, ClassLabel) and len(feature.names) != len(class_names):
        raise ValueError(
            f"label_column {label_column!r} knows {len(feature.names)} classes, but class_names has "
            f"{len(class_names)}: give one name for each, in the order of the labels."
        )
    if isinstance(feature, ClassLabel) and set(feature.names) == set(class_names):
        labels = [feature.names[label] if label is not None and label >= 0 else label for label in labels]
    allowed = position if any(isinstance(label, str) for label in labels) else {i: i for i in position.values()}
    unknown = [row for row, label in enumerate(labels) if label not in allowed]
    if unknown:
        raise ValueError(
            f"{len(unknown)} labels of {label_column!r} are not classes, first {labels[unknown[0]]!r} in row "
            f"{unknown[0]}: a label is one of the {len(class_names)} class_names, or a position among them, 0 to "
            f"{len(class_names) - 1}. Drop unlabelled rows with dataset.filter."
        )
    return np.array([allowed[label] for label in labels], dtype=np.int64)
