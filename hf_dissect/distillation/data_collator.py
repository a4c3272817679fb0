"""Makes batches of several modalities, in which a row that lacks something keeps its place and says so."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase

from hf_dissect.data.images import UnusableImage, decode_image


class RowState(IntEnum):
    """What a row is good for."""

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
        """Whether it can train anything."""
        return self < RowState.LABEL_AND_AUXILIARY_MISSING

    @property
    def description(self) -> str:
        return self.name.lower().replace("_", " ")


def row_masks(row_state: Any) -> tuple[Any, Any]:
    """Which rows can train the student's task, and which of any label the terms that compare modalities.

    Args:
        row_state: tensor or array `(B,)` of `RowState`; rows of both are `COMPLETE`.

    Returns:
        `has_label` and `has_auxiliaries`, bool `(B,)`; the student can read the rows of either.
    """
    has_auxiliaries = row_state <= RowState.LABEL_MISSING
    has_label = (row_state < RowState.LABEL_AND_AUXILIARY_MISSING) & (row_state != RowState.LABEL_MISSING)
    return has_label, has_auxiliaries


class _Unusable(ValueError):
    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind  # the end of the name of a RowState


class DistillationCollator:
    """Collates rows of `ModalityRows`.

    Args:
        modalities: the student's first.
        input_names: of each modality, the keyword that its encoder takes an array under.
        processors: image processor or tokenizer of each modality that is not an array.
        shapes: of each array modality, as in the training data; a row of another shape cannot be read.
        max_caption_length: tokens that texts are cut to; None for the tokenizer's limit.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        input_names: Mapping[str, str],
        processors: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        max_caption_length: int | None = None,
    ):
        self.modalities = list(modalities)
        self.input_names = dict(input_names)
        self.processors = dict(processors)
        self.shapes = dict(shapes)
        self.max_caption_length = max_caption_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate `B` rows; what cannot be used is a placeholder.

        Returns:
            `inputs`, by modality the keywords of its encoder, each with leading dimension `B`; `label` int64 `(B,)`,
            0 where it is missing; `row` int64 `(B,)`; `row_state` int8 `(B,)` (`RowState`).
        """
        states = [RowState.COMPLETE if row["label"] >= 0 else RowState.LABEL_MISSING for row in rows]
        inputs = {}
        for name in [name for name in self.modalities if name in rows[0]]:
            values = []
            for place, row in enumerate(rows):
                try:
                    values.append(self._value(name, row[name]))
                except _Unusable as problem:
                    states[place] = self._state(states[place], name, problem.kind)
                    values.append(self._placeholder(name))
            inputs[name] = self._batch(name, values)
        return {
            "inputs": inputs,
            "label": torch.tensor([max(row["label"], 0) for row in rows]),
            "row": torch.tensor([row["row"] for row in rows]),
            "row_state": torch.tensor(states, dtype=torch.int8),
        }

    def _state(self, state: RowState, name: str, kind: str) -> RowState:
        """Of a row of some state, once a modality turned out to be of no use."""
        if name == self.modalities[0]:
            return RowState[f"STUDENT_{kind}"]
        if state in (RowState.LABEL_MISSING, RowState.LABEL_AND_AUXILIARY_MISSING):
            return RowState.LABEL_AND_AUXILIARY_MISSING
        return max(state, RowState[f"AUXILIARY_{kind}"])

    def _value(self, name: str, value: Any) -> Any:
        if value is None:
            raise _Unusable("MISSING")
        if name not in self.processors:
            return self._array(name, value)
        if isinstance(self.processors[name], PreTrainedTokenizerBase):
            return _text(value)
        try:
            return decode_image(value)
        except UnusableImage as error:
            raise _Unusable("UNREADABLE") from error

    def _array(self, name: str, value: Any) -> np.ndarray:
        try:
            array = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:  # not numbers, or lists of unequal lengths
            raise _Unusable("UNREADABLE") from error
        if array.size == 0 or np.isnan(array).all():
            raise _Unusable("MISSING")
        if array.shape != self.shapes[name]:
            raise _Unusable("UNREADABLE")
        if not np.isfinite(array).all():
            raise _Unusable("NOT_FINITE")
        return array

    def _placeholder(self, name: str) -> Any:
        if name not in self.processors:
            return np.zeros(self.shapes[name], np.float32)
        return "" if isinstance(self.processors[name], PreTrainedTokenizerBase) else Image.new("RGB", (32, 32))

    def _batch(self, name: str, values: list) -> dict[str, torch.Tensor]:
        processor = self.processors.get(name)
        if processor is None:
            return {self.input_names[name]: torch.from_numpy(np.stack(values))}
        if isinstance(processor, PreTrainedTokenizerBase):
            encoded: BatchFeature = processor(
                values, padding="longest", truncation=True, max_length=self.max_caption_length, return_tensors="pt"
            )
            return dict(encoded)
        return dict(processor(images=values, return_tensors="pt"))


def _text(value: Any) -> str:
    if isinstance(value, list | np.ndarray):  # several captions of an image: the first
        value = next(iter(value), None)
    if not isinstance(value, str):
        raise _Unusable("MISSING" if value is None else "UNREADABLE")
    if not value.strip():
        raise _Unusable("MISSING")
    return value


def array_shape(values: Sequence, name: str) -> tuple[int, ...]:
    """Shape of the first array of a column that has one.

    Raises:
        ValueError: no row holds an array of numbers.
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
