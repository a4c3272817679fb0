"""The rows of a data set by modality: which columns there are, what they hold, and which class is which number."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from torch.utils.data import Dataset as TorchDataset

Columns = Dataset | Mapping[str, Sequence]


def column_names(columns: Columns) -> list[str]:
    """The names of the columns, in their order."""
    return list(columns.column_names if isinstance(columns, Dataset) else columns)


class ModalityRows(TorchDataset):
    """Rows as dicts of the modalities, `label` and `row`, the row number.

    Args:
        columns: a `datasets.Dataset`, or a mapping of names to arrays or lists of equal length.
        modalities: the columns wanted, the student's first.
        label_column: of class names, integers or a `ClassLabel`.
        labels: names of the classes, as found in the training data; None: they are found here.
        optional: modalities that may have no column (at evaluation).

    Attributes:
        modalities: those that there are.
        labels: names of the classes, in the order of their numbers.

    Raises:
        ValueError: a column is missing, their lengths differ, there is no row, or a label is no class.
    """

    def __init__(
        self,
        columns: Columns,
        modalities: Sequence[str],
        label_column: str,
        *,
        labels: Sequence[str] | None = None,
        optional: Sequence[str] = (),
    ):
        names = column_names(columns)
        for name in [*modalities, label_column]:
            if name not in names and name not in optional:
                raise ValueError(f"There is no column {name!r}; there are {', '.join(map(repr, names))}.")
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"A modality is named twice: {', '.join(modalities)}.")
        self.modalities = [name for name in modalities if name in names]
        if not isinstance(columns, Dataset):
            check_lengths({name: columns[name] for name in [*self.modalities, label_column]})
        self._columns = _undecoded(columns, [*self.modalities, label_column])
        self._label_column = label_column
        values = columns[label_column]
        if len(values) == 0:
            raise ValueError("There are no rows.")
        names_of_values = _label_names(columns, label_column, values)
        self.labels = _classes(names_of_values) if labels is None else list(labels)
        self._label = _numbers(names_of_values, self.labels, label_column)

    def __len__(self) -> int:
        return len(self._label)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if isinstance(self._columns, Dataset):
            values = self._columns[int(row)]
        else:
            values = {name: self._columns[name][row] for name in self.modalities}
        return {name: values[name] for name in self.modalities} | {"label": self._label[row], "row": int(row)}

    @property
    def label_numbers(self) -> torch.Tensor:
        """int64 `(n,)`, -1 where a row has none."""
        return torch.tensor(self._label)


def check_lengths(columns: Mapping[str, Sequence], subject: str = "The columns") -> None:
    """Make sure that columns have equally many rows (`ValueError`, which begins with `subject`)."""
    lengths = {name: len(values) if getattr(values, "ndim", 1) else 0 for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{subject} differ in length ({told}); row i of each must belong to the same sample.")


def _undecoded(columns: Columns, names: list[str]) -> Columns:
    """The columns in the form that is cheap to read, pictures still as files: the collator decodes them."""
    if not isinstance(columns, Dataset):
        return {name: columns[name] for name in names}
    columns = columns.select_columns(names)
    for name in names:
        if isinstance(columns.features[name], Image):
            columns = columns.cast_column(name, Image(decode=False))
    return columns.with_format("numpy", columns=_numeric(columns), output_all_columns=True)


def _numeric(columns: Dataset) -> list[str]:
    nested = ("Array", "List", "Sequence", "LargeList")
    return [
        name
        for name, feature in columns.features.items()
        if type(feature).__name__.startswith(nested) and "string" not in repr(feature)
    ]


def _label_names(columns: Columns, label_column: str, values: Sequence) -> list[str | None]:
    feature = columns.features[label_column] if isinstance(columns, Dataset) else None
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(int(value)) for value in values]
    return [_label_name(value) for value in np.asarray(values, dtype=object).tolist()]


def _label_name(value: Any) -> str | None:
    if value is None or value != value or value == "":  # NaN is not itself
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _classes(names: list[str | None]) -> list[str]:
    found = {name for name in names if name is not None}
    if len(found) < 2:
        raise ValueError(f"There are {len(found)} classes among the labels; at least 2 are needed.")
    numeric = all(name.lstrip("-").isdecimal() for name in found)
    return sorted(found, key=int if numeric else str)


def _numbers(names: list[str | None], labels: list[str], label_column: str) -> list[int]:
    number = {name: place for place, name in enumerate(labels)} | {None: -1}
    unknown = sorted({name for name in names if name not in number})
    if unknown:
        raise ValueError(
            f"{label_column}: {', '.join(unknown[:5])} is no class of the training data, which has {len(labels)}: "
            f"{', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
        )
    return [number[name] for name in names]
