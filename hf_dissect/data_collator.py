"""Rows to candidate batches: decoded and tokenised in the data loader's workers, bad rows marked, not fatal."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_dissect.data.images import UnusableImage, decode_image, image_content, is_feature_vector
from hf_dissect.data.pairs import key_hash


class BadReason(IntEnum):
    """Why a row cannot train; `GOOD` when it can."""

    GOOD = 0
    IMAGE = 1
    CAPTION_MISSING = 2
    CAPTION_NOT_TEXT = 3

    @property
    def description(self) -> str:
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    BadReason.GOOD: "good",
    BadReason.IMAGE: "image missing or undecodable",
    BadReason.CAPTION_MISSING: "caption missing or empty",
    BadReason.CAPTION_NOT_TEXT: "caption not a string",
}


class SelectionCollator:
    """Collates pairs into candidate batches that carry sample ids.

    A bad row keeps its place with a placeholder and a reason, so that batches have the same size on all ranks; the
    trainer drops it before anything is learnt from it.

    Args:
        processor: of the model, with `tokenizer` and `image_processor`, or a bare tokenizer when the images are
            precomputed feature vectors.
        text_padding: "longest" in the batch, or "max_length" for models that pool the last position (SigLIP).
        max_caption_length: tokens a caption is cut to; None for the tokenizer's own limit.
    """

    def __init__(self, processor: Any, *, text_padding: str = "longest", max_caption_length: int | None = None):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor = getattr(processor, "image_processor", None)
        self.text_padding = text_padding
        self.max_caption_length = max_caption_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `B` dicts with `image`, `caption`, `sample_id` and optionally `task_id`, `is_clean`.

        Returns:
            The model's inputs (`pixel_values`, `input_ids`, ...) and, with leading dimension `B`: `sample_id`,
            `image_key`, `caption_key` int64, `bad_reason` int8 (`BadReason`), and `task_id` int64 and `is_clean` bool
            where the rows have them.

        Raises:
            ValueError: a row has no sample id, or pictures came without an image processor.
        """
        if any("sample_id" not in row for row in rows):
            raise ValueError(
                "A row has no sample_id; wrap the data with hf_dissect.data.as_pairs, which numbers pairs."
            )
        reasons = [_caption_reason(row["caption"]) for row in rows]
        captions = ["" if reason else row["caption"] for row, reason in zip(rows, reasons, strict=True)]
        batch = {**self._images(rows, reasons), **self._texts(captions)}
        batch["sample_id"] = torch.tensor([row["sample_id"] for row in rows])
        batch["image_key"] = torch.tensor([key_hash(image_content(row["image"]) or b"") for row in rows])
        batch["caption_key"] = torch.tensor([key_hash(caption) for caption in captions])
        batch["bad_reason"] = torch.tensor(reasons, dtype=torch.int8)
        if "task_id" in rows[0]:
            batch["task_id"] = torch.tensor([row["task_id"] for row in rows])
        if "is_clean" in rows[0]:
            batch["is_clean"] = torch.tensor([row["is_clean"] for row in rows])
        return batch

    def _texts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(
            captions,
            padding=self.text_padding,
            truncation=True,
            max_length=self.max_caption_length,
            return_tensors="pt",
        )
        return dict(encoded)

    def _images(self, rows: Sequence[dict[str, Any]], reasons: list[int]) -> dict[str, torch.Tensor]:
        if any(is_feature_vector(row["image"]) for row in rows):
            return {"pixel_values": _stack_features(rows, reasons)}
        if self.image_processor is None:
            raise ValueError(
                "The rows hold pictures, but the processor has no image_processor; pass the model's whole processor, "
                "or use precomputed feature vectors as the image column."
            )
        images = []
        for position, row in enumerate(rows):
            try:
                # A row without a caption is lost already: its image need not be decoded.
                images.append(_PLACEHOLDER if reasons[position] else _large_enough(decode_image(row["image"])))
            except UnusableImage:
                reasons[position] = BadReason.IMAGE
                images.append(_PLACEHOLDER)
        return dict(self.image_processor(images=images, return_tensors="pt"))


_PLACEHOLDER = Image.new("RGB", (32, 32))


def _large_enough(image: Image.Image) -> Image.Image:
    # An image one to four pixels high or wide looks like a channel dimension to the image processors.
    if min(image.size) > 4:
        return image
    return image.resize((max(image.width, 8), max(image.height, 8)), Image.Resampling.NEAREST)


def _caption_reason(caption: Any) -> int:
    if caption is None:
        return BadReason.CAPTION_MISSING
    if not isinstance(caption, str):
        return BadReason.CAPTION_NOT_TEXT
    return BadReason.GOOD if caption.strip() else BadReason.CAPTION_MISSING


def _stack_features(rows: Sequence[dict[str, Any]], reasons: list[int]) -> torch.Tensor:
    dim = next(len(row["image"]) for row in rows if is_feature_vector(row["image"]))
    features = np.zeros((len(rows), dim), dtype=np.float32)
    for position, row in enumerate(rows):
        value = row["image"]
        if is_feature_vector(value) and len(value) == dim and np.isfinite(value).all():
            features[position] = value
        else:
            reasons[position] = BadReason.IMAGE
    return torch.from_numpy(features)
