"""Collator that makes candidate batches in the workers of a data loader, and marks unreadable rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.caption_lengths import pad_captions
from hf_dissect.data.encoded_pictures import as_numpy, is_byte_array
from hf_dissect.data.image_processing import SizedProcessing, find_processing
from hf_dissect.data.images import UnusableImage, decode_image, find_path, image_content, is_feature_vector
from hf_dissect.data.pair_keys import GIVEN_WEIGHT, WEIGHT_KEY
from hf_dissect.data.pair_weights import describe_weight_problem
from hf_dissect.data.pairs import ROW_KEYS, key_hash
from hf_dissect.data.problems import PROBLEM_KEY, join_problem, pack_problems
from hf_dissect.data.stored_features import stack_text_features
from hf_dissect.data.surrogates import MARK, is_unencodable


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
        caption_lengths: Lengths in tokens, ascending, to which the captions of a batch are padded, see
            `choose_caption_lengths`; empty to pad them as `text_padding` says.
        reads_features: True for a model of feature vectors, False for one of pictures; None to recognise the kind from
            the first rows.
        text_feature_size: Dimension of the stored features of the captions, for a model that reads those; the image
            processor alone is then enough. None for a model that reads tokens.
        fast_decoding: True to decode large JPEGs at a smaller size, see `decode_image`.

    Raises:
        ValueError: The processor has no tokenizer, or its tokenizer cannot pad.
    """

    def __init__(
        self,
        processor: Any,
        *,
        text_padding: str = "longest",
        max_caption_length: int | None = None,
        caption_lengths: Sequence[int] = (),
        reads_features: bool | None = None,
        text_feature_size: int | None = None,
        fast_decoding: bool = False,
    ) -> None:
        self.text_feature_size = text_feature_size
        self.tokenizer = find_tokenizer(processor) if text_feature_size is None else None
        alone = processor if text_feature_size is not None else None
        self.image_processor = getattr(processor, "image_processor", alone)
        self.text_padding = text_padding
        self.max_caption_length = max_caption_length
        self.caption_lengths = tuple(caption_lengths)
        self.reads_features = reads_features
        self.fast_decoding = fast_decoding
        self._feature_dim: int | None = None
        self._processing = SizedProcessing()

    @contextmanager
    def at_size(self, size: int | None) -> Iterator[None]:
        """Prepare pictures with a side of `size` pixels within the context; None for the model's own size.

        Raises:
            ValueError: The image processor cannot prepare pictures of this size.
        """
        before, self._processing = self._processing, find_processing(self.image_processor, size)
        try:
            yield
        finally:
            self._processing = before

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `B` pairs.

        Args:
            rows: Dicts with `image`, `caption`, `sample_id` and optionally `task_id`, `is_clean` and `weight`.

        Returns:
            Inputs of the model (`pixel_values`, `input_ids`, ...), and columns `(B,)`: `sample_id`, `image_key` and
            `caption_key` int64, `bad_reason` int8 (`BadReason`), `bad_problem` uint8 `(B, 240)` (see
            `hf_dissect.data.problems`), and `task_id` int64, `is_clean` bool and `given_weight` float32 if the rows
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
        problems = [_describe_caption(row, reason) for row, reason in zip(rows, reasons, strict=True)]
        captions = ["" if reason else row["caption"] for row, reason in zip(rows, reasons, strict=True)]
        image_keys = [key_hash(image_content(row["image"]) or b"") for row in rows]
        weights = _read_weights(rows, reasons, problems) if any(WEIGHT_KEY in row for row in rows) else None
        images = self._process_distinct_images(rows, image_keys, reasons, problems)
        if self.text_feature_size is None:
            batch = {**images, **self._tokenise(captions)}
            caption_keys = list(map(key_hash, captions))
        else:
            batch = {**images, "text_features": stack_text_features(rows, reasons, self.text_feature_size)}
            caption_keys = [key_hash(vector.tobytes()) for vector in batch["text_features"].numpy()]
        batch["sample_id"] = _read_integers(rows, "sample_id")
        batch["image_key"] = torch.tensor(image_keys)
        batch["caption_key"] = torch.tensor(caption_keys)
        batch["bad_reason"] = torch.tensor(reasons, dtype=torch.int8)
        batch[PROBLEM_KEY] = pack_problems(problems)
        if "task_id" in rows[0]:
            batch["task_id"] = _read_integers(rows, "task_id")
        if "is_clean" in rows[0]:
            batch["is_clean"] = torch.tensor([bool(row["is_clean"]) for row in rows])
        if weights is not None:
            batch[GIVEN_WEIGHT] = torch.tensor(weights, dtype=torch.float32)
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
        return pad_captions(dict(encoded), self.caption_lengths, self.padding)

    @property
    def has_few_shapes(self) -> bool:
        """True if batches of as many pairs have one of a few shapes, and not one for each length of a caption."""
        return self.tokenizer is None or self.text_padding == "max_length" or bool(self.caption_lengths)

    def _process_distinct_images(
        self, rows: Sequence[dict[str, Any]], image_keys: Sequence[int], reasons: list[int], problems: list[str]
    ) -> dict[str, torch.Tensor]:
        """Process each image once, and repeat it for the other readable pairs that share it."""
        shared = list(zip(image_keys, reasons, strict=True))
        first_row = {key: row for row, key in reversed(list(enumerate(shared)))}
        if len(first_row) == len(rows) or self._find_feature_dim(rows) is not None:
            return self._process_images(rows, reasons, problems)
        first = sorted(first_row.values())
        place_of_row = {row: place for place, row in enumerate(first)}
        places = [place_of_row[first_row[key]] for key in shared]
        reasons_of_images, problems_of_images = [reasons[row] for row in first], [problems[row] for row in first]
        processed = self._process_images([rows[row] for row in first], reasons_of_images, problems_of_images)
        if any(len(value) != len(first) for value in processed.values()):  # not one entry for each image
            return self._process_images(rows, reasons, problems)
        for row, place in enumerate(places):
            if not reasons[row]:
                reasons[row], problems[row] = reasons_of_images[place], problems_of_images[place]
        return {name: value[places] for name, value in processed.items()}

    def _process_images(
        self, rows: Sequence[dict[str, Any]], reasons: list[int], problems: list[str]
    ) -> dict[str, torch.Tensor]:
        if self._find_feature_dim(rows) is not None:
            return {"pixel_values": self._stack_features(rows, reasons, problems)}
        if self.image_processor is None:
            raise ValueError(
                "The rows hold no feature vectors, and the processor has no image_processor for pictures; pass the "
                "model's whole processor, or use precomputed feature vectors as the image column."
            )
        side = find_side(self.image_processor) if self.fast_decoding else None
        smallest_side = self._processing.smallest_side or (None if side is None else 2 * side)
        images = []
        for position, row in enumerate(rows):
            try:
                # A row without a caption is unreadable, so its image need not be decoded.
                is_bad, image = reasons[position], row["image"]
                images.append(_PLACEHOLDER if is_bad else _make_usable_shape(decode_image(image, smallest_side)))
            except UnusableImage as error:
                reasons[position] = BadReason.IMAGE
                problems[position] = join_problem(error.problem, error.path or _find_name(row))
                images.append(_PLACEHOLDER)
        return dict(self.image_processor(images=images, return_tensors="pt", **self._processing.keywords))

    def _find_feature_dim(self, rows: Sequence[dict[str, Any]]) -> int | None:
        if self._feature_dim is None and self.reads_features is not False:
            # Bytes in an array are a damaged file sooner than a vector, where there may be pictures.
            may_be_bytes = self.image_processor is None or self.reads_features
            images = [row["image"] for row in rows if may_be_bytes or not is_byte_array(row["image"])]
            dims = Counter(len(image) for image in images if is_feature_vector(image))
            self._feature_dim = dims.most_common(1)[0][0] if dims else None
        return self._feature_dim

    def _stack_features(self, rows: Sequence[dict[str, Any]], reasons: list[int], problems: list[str]) -> torch.Tensor:
        dim = self._feature_dim or 0
        features = np.zeros((len(rows), dim), dtype=np.float32)
        for position, row in enumerate(rows):
            problem, vector = "", row["image"]
            if vector is None:
                problem = "no image"
            elif not is_feature_vector(vector):
                problem = f"{type(vector).__name__}, not a feature vector of {dim} numbers"
            elif len(vector) != dim:
                problem = f"feature vector of {len(vector)} numbers, not {dim}"
            else:
                features[position] = as_numpy(vector)
                if not np.isfinite(features[position]).all():
                    problem = "feature vector with numbers that are not finite"
                    features[position] = 0
            if problem and not reasons[position]:
                reasons[position], problems[position] = BadReason.IMAGE, join_problem(problem, _find_name(row))
        return torch.from_numpy(features)


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


def find_side(image_processor: Any) -> int | None:
    """Return the longest side in pixels to which an image processor resizes; None for one that keeps sizes."""
    size = getattr(image_processor, "size", None)
    if not getattr(image_processor, "do_resize", False) or size is None:
        return None
    sizes = dict(size) if isinstance(size, Mapping) else vars(size)
    sides = [side for name in ("height", "width", "shortest_edge") if (side := sizes.get(name))]
    return max(sides) if sides and not sizes.get("longest_edge") else None


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
    if is_unencodable(caption):
        return BadReason.CAPTION_NOT_UNICODE
    return BadReason.GOOD if caption.strip() else BadReason.CAPTION_MISSING


def _describe_caption(row: dict[str, Any], reason: int) -> str:
    if reason not in (BadReason.CAPTION_NOT_TEXT, BadReason.CAPTION_NOT_UNICODE):
        return ""
    caption = row["caption"]
    kind = f"{type(caption).__name__} " if reason == BadReason.CAPTION_NOT_TEXT else ""
    shown = caption.removeprefix(MARK) if isinstance(caption, str) else ascii(caption)
    return join_problem(f"{kind}{shown[:80]}", _find_name(row))


def _find_name(row: dict[str, Any]) -> str | None:
    """Return the path of the image of a pair, or its key in the data; None if it has neither."""
    return find_path(row["image"]) or row.get("key")


def _read_weights(rows: Sequence[dict[str, Any]], reasons: list[int], problems: list[str]) -> list[float]:
    """Return the weights, 0 for a bad row; a row without a usable weight becomes one."""
    weights = []
    for position, row in enumerate(rows):
        problem = describe_weight_problem(row.get(WEIGHT_KEY))
        if problem is not None and not reasons[position]:
            reasons[position], problems[position] = BadReason.WEIGHT, join_problem(problem, _find_name(row))
        weights.append(0.0 if problem is not None else float(row[WEIGHT_KEY]))
    return weights


def _read_integers(rows: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    values = [row[key] for row in rows]
    wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, Integral)), None)
    if wrong is not None or None in values:
        raise ValueError(
            f"{key}={wrong!r}: must be an integer; hf_dissect.data.as_pairs numbers pairs and hashes keys."
        )
    return torch.tensor(values, dtype=torch.int64)
