"""Collator that makes candidate batches in the workers of a data loader, and marks unreadable rows."""

from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.images import UnusableImage, decode_image, image_content, is_feature_vector
from hf_dissect.data.pairs import ROW_KEYS, key_hash
from hf_dissect.data.stored_features import stack_text_features


class SelectionCollator:
    """Collator that decodes and tokenises pairs, and makes candidate batches with sample ids.

    An unreadable row keeps its place, with a placeholder and a reason, so that batches have the same size on all
    ranks; the selector drops it.

    Args:
        processor: Processor of the model, with `tokenizer` and `image_processor`; a tokenizer is enough if the images
            are precomputed feature vectors.
        text_padding: Padding of the captions, "longest" (of the batch) or "max_length", for models that read the last
            position (SigLIP).
        max_caption_length: Number of tokens after which a caption is cut; None for the limit of the tokenizer.
        text_feature_size: Dimension of the stored features of the captions, for a model that reads those; the image
            processor alone is then enough. None for a model that reads tokens.

    Raises:
        ValueError: The processor has no tokenizer, or its tokenizer cannot pad.
    """

    def __init__(
        self,
        processor: Any,
        *,
        text_padding: str = "longest",
        max_caption_length: int | None = None,
        text_feature_size: int | None = None,
    ) -> None:
        self.text_feature_size = text_feature_size
        self.tokenizer = find_tokenizer(processor) if text_feature_size is None else None
        alone = processor if text_feature_size is not None else None
        self.image_processor = getattr(processor, "image_processor", alone)
        self.text_padding = text_padding
        self.max_caption_length = max_caption_length
        self._feature_dim: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `B` pairs.

        Args:
            rows: Dicts with `image`, `caption`, `sample_id` and optionally `task_id` and `is_clean`.

        Returns:
            Inputs of the model (`pixel_values`, `input_ids`, ...), and columns `(B,)`: `sample_id`, `image_key` and
            `caption_key` int64, `bad_reason` int8 (`BadReason`), and `task_id` int64 and `is_clean` bool if the rows
            have them.

        Raises:
            ValueError: Rows are not pairs with integer ids, or there are pictures and no image processor.
        """
        for key in ROW_KEYS:
            if any(key not in row for row in rows):
                raise ValueError(
                    f"A row has no {key}; wrap the data with hf_dissect.data.as_pairs, which makes numbered pairs."
                )
        reasons = [_find_caption_reason(row["caption"]) for row in rows]
        captions = ["" if reason else row["caption"] for row, reason in zip(rows, reasons, strict=True)]
        image_keys = [key_hash(image_content(row["image"]) or b"") for row in rows]
        batch = self._process_distinct_images(rows, image_keys, reasons)
        if self.text_feature_size is None:
            batch |= self._tokenise(captions)
            caption_keys = list(map(key_hash, captions))
        else:
            batch["text_features"] = stack_text_features(rows, reasons, self.text_feature_size)
            caption_keys = [key_hash(vector.tobytes()) for vector in batch["text_features"].numpy()]
        batch["sample_id"] = _read_integers(rows, "sample_id")
        batch["image_key"] = torch.tensor(image_keys)
        batch["caption_key"] = torch.tensor(caption_keys)
        batch["bad_reason"] = torch.tensor(reasons, dtype=torch.int8)
        if "task_id" in rows[0]:
            batch["task_id"] = _read_integers(rows, "task_id")
        if "is_clean" in rows[0]:
            batch["is_clean"] = torch.tensor([bool(row["is_clean"]) for row in rows])
        return batch

    @property
    def padding(self) -> dict[str, tuple[int, str]]:
        """Value and side ("left" or "right") of the padding of captions, by key of the batch."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return {}
        return {
            "input_ids": (tokenizer.pad_token_id, tokenizer.padding_side),
            "attention_mask": (0, tokenizer.padding_side),
            "token_type_ids": (tokenizer.pad_token_type_id, tokenizer.padding_side),
        }

    def _tokenise(self, captions: list[str]) -> dict[str, torch.Tensor]:
        encoded = cast(PreTrainedTokenizerBase, self.tokenizer)(
            captions,
            padding=self.text_padding,
            truncation=True,
            max_length=self.max_caption_length,
            return_tensors="pt",
        )
        return dict(encoded)

    def _process_distinct_images(
        self, rows: Sequence[dict[str, Any]], image_keys: Sequence[int], reasons: list[int]
    ) -> dict[str, torch.Tensor]:
        """Process each image once, and repeat it for the other readable pairs that share it."""
        shared = list(zip(image_keys, reasons, strict=True))
        first_row = {key: row for row, key in reversed(list(enumerate(shared)))}
        if len(first_row) == len(rows) or any(is_feature_vector(row["image"]) for row in rows):
            return self._process_images(rows, reasons)
        first = sorted(first_row.values())
        place_of_row = {row: place for place, row in enumerate(first)}
        places = [place_of_row[first_row[key]] for key in shared]
        reasons_of_images = [reasons[row] for row in first]
        processed = self._process_images([rows[row] for row in first], reasons_of_images)
        if any(len(value) != len(first) for value in processed.values()):  # not one entry for each image
            return self._process_images(rows, reasons)
        reasons[:] = [reasons_of_images[place] for place in places]
        return {name: value[places] for name, value in processed.items()}

    def _process_images(self, rows: Sequence[dict[str, Any]], reasons: list[int]) -> dict[str, torch.Tensor]:
        dims = Counter(len(row["image"]) for row in rows if is_feature_vector(row["image"]))
        if self._feature_dim is None and dims:
            self._feature_dim = dims.most_common(1)[0][0]
        if self._feature_dim is not None:
            return {"pixel_values": _stack_features(rows, reasons, self._feature_dim)}
        if self.image_processor is None:
            raise ValueError(
                "The rows hold no feature vectors, and the processor has no image_processor for pictures; pass the "
                "model's whole processor, or use precomputed feature vectors as the image column."
            )
        images = []
        for position, row in enumerate(rows):
            try:
                # A row without a caption is unreadable, so its image need not be decoded.
                images.append(_PLACEHOLDER if reasons[position] else _make_usable_shape(decode_image(row["image"])))
            except UnusableImage:
                reasons[position] = BadReason.IMAGE
                images.append(_PLACEHOLDER)
        return dict(self.image_processor(images=images, return_tensors="pt"))


def find_tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the processor itself if it is a tokenizer.

    Raises:
        ValueError: The processor has no tokenizer, or its tokenizer cannot pad.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class is a {type(processor).__name__} without a tokenizer; pass the model's whole processor "
            "(AutoProcessor), or its tokenizer when the images are precomputed feature vectors."
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            f"processing_class: its {type(tokenizer).__name__} has no pad_token, so captions of different lengths "
            "make no batch; set tokenizer.pad_token."
        )
    return tokenizer


_PLACEHOLDER = Image.new("RGB", (32, 32))
_MOST_ELONGATED = 50


def _make_usable_shape(image: Image.Image) -> Image.Image:
    if min(image.size) <= 4:
        # Image processors take a side of one to four pixels for the channel dimension.
        size = (max(image.width, 8), max(image.height, 8))
        image = image.resize(size, Image.Resampling.NEAREST)
    longest = _MOST_ELONGATED * min(image.size)
    if max(image.size) > longest:
        # Image processors scale the shorter side up, and a line of pixels would then fill the memory.
        image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))
    return image


def _find_caption_reason(caption: Any) -> int:
    if caption is None:
        return BadReason.CAPTION_MISSING
    if not isinstance(caption, str):
        return BadReason.CAPTION_NOT_TEXT
    return BadReason.GOOD if caption.strip() else BadReason.CAPTION_MISSING


def _read_integers(rows: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    values = [row[key] for row in rows]
    wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, Integral)), None)
    if wrong is not None or None in values:
        raise ValueError(
            f"{key}={wrong!r}: must be an integer; hf_dissect.data.as_pairs numbers pairs and hashes keys."
        )
    return torch.tensor(values, dtype=torch.int64)


def _stack_features(rows: Sequence[dict[str, Any]], reasons: list[int], dim: int) -> torch.Tensor:
    features = np.zeros((len(rows), dim), dtype=np.float32)
    usable = np.zeros(len(rows), dtype=bool)
    for position, row in enumerate(rows):
        if is_feature_vector(row["image"]) and len(row["image"]) == dim:
            features[position] = row["image"]
            usable[position] = True
    usable &= np.isfinite(features).all(axis=1)
    features[~usable] = 0
    for position in np.flatnonzero(~usable).tolist():
        reasons[position] = reasons[position] or BadReason.IMAGE
    return torch.from_numpy(features)
