"""Reading of pairs as inputs of small encoders: each distinct image once, captions as tokens."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect.auditing.cross_fit import PairInputs
from hf_dissect.auditing.embeddings import PairEmbeddings, join_embeddings
from hf_dissect.auditing.small_encoders import PICTURE_SIZE
from hf_dissect.data.pairs import PairDataset
from hf_dissect.data_collator import SelectionCollator
from hf_dissect.models.adapters import is_adapter
from hf_dissect.models.pretrained_parts import LOADING_ERRORS
from hf_dissect.models.tokenizer_training import train_tokenizer
from hf_dissect.models.towers import pool_images
from hf_dissect.models.vision_towers import load_vision_model, load_vision_processor
from hf_dissect.selection.scoring import CandidateScores

Encode: TypeAlias = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Function from the image inputs of `b` pairs to a tensor of `b` rows."""

_VOCABULARY = 8192
_CAPTIONS_FOR_TOKENIZER = 200_000
_LONGEST_CAPTION = 48
_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def load_image_encoder(name_or_path: str, device: torch.device) -> tuple[Any, Encode]:
    """Load a trained model that embeds images: a dual encoder, of which the images' side is used, or a vision model.

    Returns:
        Image processor, and the function that encodes its outputs.

    Raises:
        ValueError: The model cannot be loaded, or has no image processor.
    """
    try:
        if _is_dual(name_or_path):
            model: Any = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
            processor = load_vision_processor(name_or_path, model.config, "--model")
            embed = partial(_embed_by_dual_encoder, model)
        else:
            tower = load_vision_model(name_or_path, "--model")
            model, processor = tower.model, tower.processor
            embed = partial(_embed_by_tower, model, tower.pooling)
    except LOADING_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"--model {name_or_path!r} could not be loaded as an encoder of images ({reason}); name a folder or Hub "
            "id of a CLIP-like or vision model with its image processor, or leave --model out."
        ) from error
    model.to(device).eval()

    @torch.no_grad()
    def encode(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return embed({name: values.to(device) for name, values in inputs.items()}).flatten(1).float().cpu()

    return processor, encode


def _is_dual(name_or_path: str) -> bool:
    if is_adapter(name_or_path):
        return True  # of a dual encoder, since runs have no others
    config = AutoConfig.from_pretrained(name_or_path)
    return hasattr(config, "vision_config") and hasattr(config, "text_config")


def _embed_by_dual_encoder(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    outputs = model.get_image_features(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output


def _embed_by_tower(model: Any, pooling: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return pool_images(model(**inputs, return_dict=True), pooling)


def read_inputs(
    pairs: PairDataset,
    *,
    encoder: tuple[Any, Encode] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[PairEmbeddings, PairInputs]:
    """Read all pairs once.

    Args:
        pairs: Pairs of pictures, or of stored feature vectors.
        encoder: Image processor and function of `load_image_encoder`; None to take small pictures, or stored features,
            as they are.
        batch_size: Number of pairs read at a time.
        num_workers: Number of processes that decode.
        progress: Show a progress bar.

    Returns:
        Keys and problems of all pairs, with embeddings of no dimension; and the inputs of the readable ones.

    Raises:
        ValueError: No pair is readable.
    """
    captions = itertools.islice(pairs.captions(), _CAPTIONS_FOR_TOKENIZER)
    tokenizer = train_tokenizer(captions, "bert", _VOCABULARY)
    processor, encode = encoder or (_make_small_processor(), _keep)
    parts = SimpleNamespace(tokenizer=tokenizer, image_processor=processor)
    collator = SelectionCollator(parts, max_caption_length=_LONGEST_CAPTION)
    loader = DataLoader(pairs, batch_size, collate_fn=collator, num_workers=num_workers)
    reader = _Reader(encode, int(tokenizer.pad_token_id))
    batches = tqdm(loader, desc="reading pairs", unit="batch", disable=not progress)
    found = join_embeddings(reader.read(batches), lambda columns: columns)
    return found, reader.join(found, len(tokenizer))


class _Reader:
    """Collector of the images and captions of readable pairs.

    Args:
        encode: Function that turns the image inputs of new images into what is kept of them.
        padding: Token that fills short captions.
    """

    def __init__(self, encode: Encode, padding: int) -> None:
        self._encode = encode
        self._padding = padding
        self._place: dict[int, int] = {}
        self._images: list[torch.Tensor] = []
        self._image_of_pair: list[int] = []
        self._token_ids: list[torch.Tensor] = []

    def read(
        self, batches: Iterator[dict[str, torch.Tensor]]
    ) -> Iterator[tuple[dict[str, torch.Tensor], CandidateScores]]:
        """Collect each batch and yield it, with embeddings of no dimension."""
        for batch in batches:
            (readable,) = torch.nonzero(batch["bad_reason"] == 0, as_tuple=True)
            new = []
            for row in readable.tolist():
                key = int(batch["image_key"][row])
                if key not in self._place:
                    self._place[key] = len(self._place)
                    new.append(row)
                self._image_of_pair.append(self._place[key])
            if new:
                inputs = {name: batch[name][new] for name in _IMAGE_INPUTS if name in batch}
                self._images.append(self._encode(inputs))
            self._token_ids.append(batch["input_ids"][readable])
            nothing = torch.empty(len(batch["sample_id"]), 0)
            yield batch, CandidateScores(batch["sample_id"], nothing, nothing)

    def join(self, found: PairEmbeddings, vocabulary: int) -> PairInputs:
        """Join all that was collected."""
        if not self._images:
            raise ValueError("No pair is readable, so there is nothing to audit; check the columns and the pictures.")
        readable = found.bad_reason == 0
        longest = max(tokens.shape[1] for tokens in self._token_ids)
        tokens = [pad(part, (0, longest - part.shape[1]), value=self._padding) for part in self._token_ids]
        return PairInputs(
            images=torch.cat(self._images),
            image_of_pair=torch.tensor(self._image_of_pair),
            token_ids=torch.cat(tokens),
            padding=self._padding,
            vocabulary=vocabulary,
            image_key=found.image_key[readable],
            caption_key=found.caption_key[readable],
        )


def _make_small_processor() -> CLIPImageProcessorPil:
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, do_rescale=False, do_normalize=False)


def _keep(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return stored features as they are, and pictures as bytes."""
    values = inputs["pixel_values"]
    return values if values.dim() == 2 else values.round().clamp(0, 255).to(torch.uint8)
