"""Batches of several modalities, in which a row that lacks something keeps its place and is marked."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase

from hf_dissect.data.images import UnusableImage, decode_image, find_path
from hf_dissect.data.problems import PROBLEM_KEY, join_problem, pack_problems
from hf_dissect.data.surrogates import MARK, is_unencodable


class RowState(IntEnum):
    """State of a row: complete, or what it lacks."""

    COMPLETE = 0
    LABEL_MISSING = 1
    AUXILIARY_MISSING = 2
    AUXILIARY_NOT_FINITE = 3
    AUXILIARY_UNREADABLE = 4
    LABEL_AND_AUXILIARY_MISSING = 5
    STUDENT_MISSING = 6
    STUDENT_NOT_FINITE = 7
    STUDENT_UNREADABLE = 8

    @property
    def usable(self) -> bool:
        """True if the row can train any term."""
        return self < RowState.LABEL_AND_AUXILIARY_MISSING

    @property
    def description(self) -> str:
        """State in words, for messages and reports."""
        return self.name.lower().replace("_", " ")


def compute_row_masks(row_state: Any) -> tuple[Any, Any]:
    """Compute which rows have a label and which have all auxiliary modalities.

    Args:
        row_state: State of each row (`RowState`), a tensor or an array `(B,)`.

    Returns:
        `has_label` and `has_auxiliaries`, bool `(B,)`. Rows with a label train the student's task; rows with the
        auxiliary modalities train the terms that compare modalities. The student can read both kinds of rows; a row
        of both kinds is `COMPLETE`.
    """
    has_auxiliaries = row_state <= RowState.LABEL_MISSING
    has_label = (row_state < RowState.LABEL_AND_AUXILIARY_MISSING) & (row_state != RowState.LABEL_MISSING)
    return has_label, has_auxiliaries


class _UnusableValue(ValueError):
    """Error for a value that no encoder can read.

    Args:
        kind: End of the name of the `RowState` that follows.
        problem: What is wrong, in words.
        path: Path of the file, if it is known.
    """

    def __init__(self, kind: str, problem: str = "missing", path: str | None = None) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.path = kind, problem, path


class DistillationCollator:
    """Collator of the rows of `ModalityRows`.

    Args:
        modalities: Columns of the modalities, the student's first.
        input_names: Keyword of the encoder that takes the values, for each modality of arrays.
        processors: Image processor or tokenizer, for each modality of pictures or texts.
        shapes: Shape of a value, for each modality of arrays; a value of another shape is unreadable.
        max_caption_length: Number of tokens at which texts are cut; None for the tokenizer's limit.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        input_names: Mapping[str, str],
        processors: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        max_caption_length: int | None = None,
    ) -> None:
        self.modalities = list(modalities)
        self.input_names = dict(input_names)
        self.processors = dict(processors)
        self.shapes = dict(shapes)
        self.max_caption_length = max_caption_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate `B` rows, with placeholders for values that cannot be used.

        Args:
            rows: Rows with a value per modality, `label` and `row`.

        Returns:
            `inputs`, for each modality the keyword arguments of its encoder, each with leading dimension `B`; `label`
            int64 `(B,)`, 0 where it is missing; `row` int64 `(B,)`; `row_state` int8 `(B,)`, see `RowState`; and
            `bad_problem` uint8 `(B, 240)` (see `hf_dissect.data.problems`) for rows whose values cannot be used.
        """
        states = [RowState.COMPLETE if row["label"] >= 0 else RowState.LABEL_MISSING for row in rows]
        inputs, problems = {}, [""] * len(rows)
        for name in [name for name in self.modalities if name in rows[0]]:
            values = []
            for place, row in enumerate(rows):
                try:
                    values.append(self._read_value(name, row[name]))
                except _UnusableValue as error:
                    before, states[place] = states[place], self._worsen_state(states[place], name, error.kind)
                    # A row that lacks an auxiliary modality, and nothing else, is a sound one.
                    if states[place] not in (before, RowState.AUXILIARY_MISSING):
                        problems[place] = join_problem(f"{name}: {error.problem}", error.path)
                    values.append(self._make_placeholder(name))
            inputs[name] = self._make_batch(name, values)
        return {
            "inputs": inputs,
            "label": torch.tensor([max(row["label"], 0) for row in rows]),
            "row": torch.tensor([row["row"] for row in rows]),
            "row_state": torch.tensor(states, dtype=torch.int8),
            PROBLEM_KEY: pack_problems(problems),
        }

    def _worsen_state(self, state: RowState, name: str, kind: str) -> RowState:
        """Return the state of a row in which one more modality cannot be used."""
        if name == self.modalities[0]:
            return RowState[f"STUDENT_{kind}"]
        if state in (RowState.LABEL_MISSING, RowState.LABEL_AND_AUXILIARY_MISSING):
            return RowState.LABEL_AND_AUXILIARY_MISSING
        return max(state, RowState[f"AUXILIARY_{kind}"])

    def _read_value(self, name: str, value: Any) -> Any:
        if value is None:
            raise _UnusableValue("MISSING")
        if name not in self.processors:
            return self._read_array(name, value)
        if isinstance(self.processors[name], PreTrainedTokenizerBase):
            return _read_text(value)
        try:
            return decode_image(value)
        except UnusableImage as error:
            raise _UnusableValue("UNREADABLE", error.problem, error.path or find_path(value)) from error

    def _read_array(self, name: str, value: Any) -> np.ndarray:
        try:
            array = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:  # not numbers, or lists of unequal lengths
            raise _UnusableValue("UNREADABLE", f"no array of numbers ({error})") from error
        if array.size == 0 or np.isnan(array).all():
            raise _UnusableValue("MISSING")
        if array.shape != self.shapes[name]:
            raise _UnusableValue("UNREADABLE", f"an array of shape {array.shape}, not {self.shapes[name]}")
        if not np.isfinite(array).all():
            raise _UnusableValue("NOT_FINITE", f"{int((~np.isfinite(array)).sum())} numbers that are not finite")
        return array

    def _make_placeholder(self, name: str) -> Any:
        if name not in self.processors:
            return np.zeros(self.shapes[name], np.float32)
        return "" if isinstance(self.processors[name], PreTrainedTokenizerBase) else Image.new("RGB", (32, 32))

    def _make_batch(self, name: str, values: list) -> dict[str, torch.Tensor]:
        processor = self.processors.get(name)
        if processor is None:
            return {self.input_names[name]: torch.from_numpy(np.stack(values))}
        if isinstance(processor, PreTrainedTokenizerBase):
            encoded: BatchFeature = processor(
                values, padding="longest", truncation=True, max_length=self.max_caption_length, return_tensors="pt"
            )
            return dict(encoded)
        return dict(processor(images=values, return_tensors="pt"))


def find_array_shape(values: Sequence, name: str) -> tuple[int, ...]:
    """Return the shape of the first array in a column.

    Args:
        values: Values of the column; None where a row has none.
        name: Name of the column, for the error message.

    Raises:
        ValueError: No row holds an array of numbers.
    """
    for value in values:
        if value is None:
            continue
        try:
            array = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            break
        if array.ndim and array.size:
            return array.shape
    raise ValueError(
        f"{name}: no row holds an array of numbers; for pictures or texts, pass an image processor or a tokenizer "
        f"under {name!r} in processors."
    )


def _read_text(value: Any) -> str:
    if isinstance(value, list | np.ndarray):  # an image with several captions: the first one counts
        value = next(iter(value), None)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _UnusableValue("MISSING")
    if not isinstance(value, str):
        raise _UnusableValue("UNREADABLE", f"{type(value).__name__} in place of text: {str(value)[:80]}")
    if is_unencodable(value):
        raise _UnusableValue("UNREADABLE", f"text that cannot be encoded: {ascii(value.removeprefix(MARK))[:80]}")
    return value
