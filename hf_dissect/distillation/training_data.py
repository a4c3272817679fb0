"""Rows of a data set by modality: which columns there are, their values, and the numbers of the classes."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from datasets import ClassLabel, Dataset, Image
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel

from hf_dissect.distillation.data_collator import DistillationCollator, find_array_shape
from hf_dissect.distillation.evaluation import list_figures
from hf_dissect.distillation.student import StudentForClassification
from hf_dissect.distillation.training_args import DistillationTrainingArguments
from hf_dissect.training.trainer_arguments import check_best_metric

Columns: TypeAlias = Dataset | Mapping[str, Sequence]
"""Data set, or arrays and lists of equal length by the name of their column."""


class ModalityRows(TorchDataset):
    """Data set whose rows are mappings of the modalities, `label` (-1 if missing) and `row`, the row number.

    Args:
        columns: Data to read.
        modalities: Columns of the modalities, the student's first.
        label_column: Column of the classes: names, integers or a `ClassLabel`.
        labels: Names of the classes, as in the training data; None to find them in the column.
        optional: Modalities that may have no column, as in evaluation.

    Attributes:
        modalities: Modalities that have a column.
        labels: Names of the classes, in the order of their numbers.

    Raises:
        ValueError: A column is missing, the columns differ in length, there is no row, or a label is not one of
            `labels`.
    """

    def __init__(
        self,
        columns: Columns,
        modalities: Sequence[str],
        label_column: str,
        *,
        labels: Sequence[str] | None = None,
        optional: Sequence[str] = (),
    ) -> None:
        names = list_columns(columns)
        for name in [*modalities, label_column]:
            if name not in names and name not in optional:
                raise ValueError(f"There is no column {name!r}; there are {', '.join(map(repr, names))}.")
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"A modality is named twice: {', '.join(modalities)}.")
        self.modalities = [name for name in modalities if name in names]
        if not isinstance(columns, Dataset):
            check_lengths({name: columns[name] for name in [*self.modalities, label_column]})
        self._columns = _select_undecoded(columns, [*self.modalities, label_column])
        self._label_column = label_column
        values = columns[label_column]
        if len(values) == 0:
            raise ValueError("There are no rows.")
        names_of_values = _read_class_names(columns, label_column, values)
        self.labels = _find_classes(names_of_values) if labels is None else list(labels)
        self._label = _number_classes(names_of_values, self.labels, label_column)

    @property
    def label_numbers(self) -> list[int]:
        """Number of the class of each row, -1 where the label is missing."""
        return self._label

    def __len__(self) -> int:
        return len(self._label)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if isinstance(self._columns, Dataset):
            values = self._columns[int(row)]
        else:
            values = {name: self._columns[name][row] for name in self.modalities}
        return {name: values[name] for name in self.modalities} | {"label": self._label[row], "row": int(row)}


def list_columns(columns: Columns) -> list[str]:
    """Return the names of the columns, in their order."""
    return list(columns.column_names if isinstance(columns, Dataset) else columns)


def check_column(column: str, columns: Columns, key: str = "the recipe") -> None:
    """Check that the data have a column.

    Args:
        column: Name of the column.
        columns: Data.
        key: Setting that names it, for the error message.

    Raises:
        ValueError: They have not.
    """
    names = list_columns(columns)
    if column not in names:
        raise ValueError(f"{key}: there is no column {column!r}; there are {', '.join(map(repr, names))}.")


def check_lengths(columns: Mapping[str, Sequence], subject: str = "The columns") -> None:
    """Check that columns have equally many rows.

    Args:
        columns: Values by the name of their column.
        subject: First words of the error message.

    Raises:
        ValueError: The lengths differ.
    """
    lengths = {name: len(values) if getattr(values, "ndim", 1) else 0 for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{subject} differ in length ({listed}); row i of each must belong to the same sample.")


def choose_modalities(
    args: DistillationTrainingArguments, auxiliaries: Mapping[str, Any], processors: Mapping[str, Any]
) -> list[str]:
    """Return the columns of the modalities that the method reads, the student's first.

    Args:
        args: Arguments of the run.
        auxiliaries: Encoder of each auxiliary modality, by column.
        processors: Image processor or tokenizer, by column.

    Raises:
        ValueError: There is no auxiliary modality and the method needs one, or a column cannot be a modality.
    """
    if args.weights.needs_teacher and not auxiliaries:
        raise ValueError(
            f"auxiliaries is empty, and method {args.method!r} learns from them; pass the encoder of at least one."
        )
    known = {args.student_column, *auxiliaries}
    if wrong := [name for name in processors if name not in known]:
        raise ValueError(f"processors: {', '.join(wrong)} is not a modality; there are {', '.join(sorted(known))}.")
    if wrong := [name for name in auxiliaries if "." in name or not name]:
        raise ValueError(f"auxiliaries: {wrong[0]!r} cannot be the name of a modality; rename the column.")
    return [args.student_column, *(auxiliaries if args.weights.needs_teacher else ())]


def read_rows(
    argument: str,
    columns: Columns,
    modalities: Sequence[str],
    args: DistillationTrainingArguments,
    labels: Sequence[str] | None = None,
) -> ModalityRows:
    """Read the rows of training data, or of other data if the classes are known.

    Args:
        argument: Name of the argument that holds the data, for error messages.
        columns: Data to read.
        modalities: Columns of the modalities, the student's first.
        args: Arguments of the run.
        labels: Names of the classes in the training data, for data that may lack the auxiliary modalities; None for
            the training data.

    Raises:
        ValueError: The data cannot be used, see `ModalityRows`.
    """
    optional = modalities[1:] if labels is not None else ()
    try:
        return ModalityRows(columns, modalities, args.label_column, labels=labels, optional=optional)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def read_evaluation_rows(
    columns: Any, modalities: Sequence[str], args: DistillationTrainingArguments, labels: Sequence[str]
) -> ModalityRows | None:
    """Read rows to evaluate on, see `read_rows`; return rows that are read already, or None, unchanged."""
    if isinstance(columns, ModalityRows) or columns is None:
        return columns
    return read_rows("eval_dataset", columns, modalities, args, labels=labels)


def check_arguments(
    args: DistillationTrainingArguments,
    given: Mapping[str, Any],
    modalities: Sequence[str],
    evaluation: ModalityRows | None,
) -> None:
    """Check that the evaluation gives the figure that the best checkpoint is chosen by.

    Args:
        args: Arguments of the run.
        given: Further arguments of `transformers.Trainer`, by name.
        modalities: Columns of the modalities, the student's first.
        evaluation: Rows to evaluate on, if there are any.

    Raises:
        ValueError: There is no such figure.
    """
    evaluated = None if evaluation is None else evaluation.modalities
    figures = list_figures(modalities, evaluated, auxiliary_task=bool(args.weights.auxiliary_task))
    check_best_metric(args, given, figures, None)


def make_collator(
    model: PreTrainedModel,
    auxiliaries: Mapping[str, PreTrainedModel],
    columns: Columns,
    modalities: Sequence[str],
    processors: Mapping[str, Any],
    args: DistillationTrainingArguments,
) -> DistillationCollator:
    """Make the collator for the encoders and the training data of a run.

    Args:
        model: Encoder of the student, or a `StudentForClassification`.
        auxiliaries: Encoder of each auxiliary modality, by column.
        columns: Training data, from which the shapes of the arrays are read.
        modalities: Columns of the modalities, the student's first.
        processors: Image processor or tokenizer of each modality that is not an array, by column.
        args: Arguments of the run.

    Raises:
        ValueError: A modality without a processor does not hold arrays.
    """
    encoder = model.encoder if isinstance(model, StudentForClassification) else model
    encoders = {args.student_column: encoder, **auxiliaries}
    arrays = [name for name in modalities if name not in processors]
    shapes = {name: find_array_shape(columns[name], name) for name in arrays}
    input_names = {name: encoders[name].main_input_name for name in arrays}
    return DistillationCollator(modalities, input_names, processors, shapes, args.max_caption_length)


def _select_undecoded(columns: Columns, names: list[str]) -> Columns:
    """Select columns in the form that is cheap to read, with pictures as files that the collator decodes."""
    if not isinstance(columns, Dataset):
        return {name: columns[name] for name in names}
    columns = columns.select_columns(names)
    for name in names:
        if isinstance(columns.features[name], Image):
            columns = columns.cast_column(name, Image(decode=False))
    return columns.with_format("numpy", columns=_list_numeric_columns(columns), output_all_columns=True)


def _list_numeric_columns(columns: Dataset) -> list[str]:
    nested = ("Array", "List", "Sequence", "LargeList")
    return [
        name
        for name, feature in columns.features.items()
        if type(feature).__name__.startswith(nested) and "string" not in repr(feature)
    ]


def _read_class_names(columns: Columns, label_column: str, values: Sequence) -> list[str | None]:
    feature = columns.features[label_column] if isinstance(columns, Dataset) else None
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(int(value)) for value in values]
    return [_format_class_name(value) for value in np.asarray(values, dtype=object).tolist()]


def _format_class_name(value: Any) -> str | None:
    if value is None or value != value or value == "":  # NaN is not itself
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _find_classes(names: list[str | None]) -> list[str]:
    """Return the classes in the order of their numbers: by value if all are integers, otherwise by name."""
    classes = {name for name in names if name is not None}
    if len(classes) < 2:
        raise ValueError(f"There are {len(classes)} classes among the labels; at least 2 are needed.")
    if all(name.lstrip("-").isdecimal() for name in classes):
        return sorted(classes, key=int)
    return sorted(classes)


def _number_classes(names: list[str | None], labels: list[str], label_column: str) -> list[int]:
    numbers: dict[str | None, int] = {None: -1}
    numbers |= {name: number for number, name in enumerate(labels)}
    if unknown := sorted({name for name in names if name is not None and name not in numbers}):
        raise ValueError(
            f"{label_column}: {', '.join(unknown[:5])} is not a class of the training data, which has {len(labels)}: "
            f"{', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
        )
    return [numbers[name] for name in names]
