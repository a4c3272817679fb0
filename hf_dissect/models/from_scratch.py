"""Building a model and its processor from a configuration, so that training can start from scratch and offline."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    AlignProcessor,
    AutoConfig,
    AutoModel,
    ChineseCLIPProcessor,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Siglip2Processor,
    SiglipProcessor,
    VisionTextDualEncoderProcessor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# By their modules: the names in `transformers` itself may stand for the torchvision variants.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hf_dissect.models.families import count_reserved_positions, find_max_text_length, find_text_padding
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig
from hf_dissect.models.tokenizer_training import CLIP_TEXT_TOWERS, train_tokenizer

T = TypeVar("T")

PROCESSORS = {
    "clip": CLIPProcessor,
    "siglip": SiglipProcessor,
    "siglip2": Siglip2Processor,
    "align": AlignProcessor,
    "chinese_clip": ChineseCLIPProcessor,
    "vision-text-dual-encoder": VisionTextDualEncoderProcessor,
}
# SigLIP, arXiv 2303.15343, section 3.2: t' = log 10, b = -10. transformers starts both at 0.
SIGLIP_LOG_SCALE, SIGLIP_BIAS = torch.tensor(10.0).log().item(), -10.0


def build_model_and_processor(
    config: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    captions: Iterable[str] | None = None,
    vocab_size: int = 4096,
    max_caption_length: int | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """Build a model with random weights, drawn from torch's global generator, and its processor.

    `vocab_size` and the ids of the special tokens in `text_config` are taken from the tokenizer. Images are resized to
    the square of `vision_config.image_size` (bilinear, without cropping) and scaled to [-1, 1]; SigLIP 2 cuts them
    into patches of their own aspect ratio. One forward pass on a blank image and a longest caption checks that the
    parts fit together.

    Args:
        config: Content of a `config.json`. Its `model_type` is one of `PROCESSORS`; for a `vision-text-dual-encoder`,
            each tower has a `model_type` of its own.
        tokenizer: Tokenizer of the captions; None to train one on `captions` with at most `vocab_size` tokens.
        captions: Texts to train the tokenizer on.
        vocab_size: Largest number of tokens of a trained tokenizer.
        max_caption_length: Number of tokens of the longest caption, which becomes the size of the position table
            unless the configuration sets that.

    Returns:
        The model in evaluation mode and its processor; the tokenizer alone if the images are stored features.

    Raises:
        ValueError: If a key of `config` or an argument is wrong; the message names it and what is allowed.
    """
    config_class = _config_class(config, "config", PROCESSORS)
    text_class = _tower_class(config, config_class, "text_config")
    vision_class = _tower_class(config, config_class, "vision_config")
    _check_keys(config, config_class, "config")
    if tokenizer is None:
        if captions is None:
            raise ValueError(
                "config without a tokenizer needs captions to train one on; give captions, or set tokenizer to a Hub "
                "id or a folder (model.tokenizer in a recipe)"
            )
        tokenizer = train_tokenizer(captions, text_class.model_type, vocab_size)
    text = {**(config.get("text_config") or {}), **_token_fields(tokenizer, text_class.model_type)}
    if max_caption_length is not None and "max_position_embeddings" not in text:
        text["max_position_embeddings"] = max_caption_length + count_reserved_positions(text_class(**text))
    model_config = _build(lambda: config_class(**_without_type({**config, "text_config": text})), config)
    if max_caption_length is not None:
        tokenizer.model_max_length = max_caption_length
    tokenizer.model_max_length = find_max_text_length(model_config, tokenizer)
    if vision_class is PrecomputedFeaturesConfig:
        processor = tokenizer
    else:
        processor = PROCESSORS[config["model_type"]](_image_processor(model_config.vision_config), tokenizer)
    model = _build(lambda: AutoModel.from_config(model_config).eval(), config)
    if hasattr(model, "logit_bias"):
        torch.nn.init.constant_(model.logit_scale, SIGLIP_LOG_SCALE)
        torch.nn.init.constant_(model.logit_bias, SIGLIP_BIAS)
    _build(lambda: _check_forward(model, processor), config)
    return model, processor


def _config_class(config: Mapping[str, Any], where: str, allowed: Iterable[str]) -> type[PreTrainedConfig]:
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(model_type, str) or model_type not in allowed:
        raise ValueError(
            f"{where} must be a mapping whose model_type is one of {', '.join(allowed)}, got "
            f"{(model_type if isinstance(config, Mapping) else config)!r}; load any other dual encoder by name_or_path"
        )
    return CONFIG_MAPPING[model_type]


def _tower_class(config: Mapping[str, Any], config_class: type[PreTrainedConfig], key: str) -> type[PreTrainedConfig]:
    tower = config.get(key) or {}
    if not isinstance(tower, Mapping):
        raise ValueError(f"config.{key} must be a mapping of settings, got {tower!r}")
    tower_class = config_class.sub_configs[key]
    if tower_class is AutoConfig:
        if tower.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"config.{key}.model_type must name the tower's architecture, such as bert, clip_text_model, vit, "
                f"clip_vision_model or precomputed_features, got {tower.get('model_type')!r}"
            )
        tower_class = CONFIG_MAPPING[tower["model_type"]]
    _check_keys(tower, tower_class, f"config.{key}")
    return tower_class


def _check_keys(values: Mapping[str, Any], config_class: type[PreTrainedConfig], where: str) -> None:
    # transformers keeps a misspelt key as an attribute that is never read.
    allowed = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for key in values:
        if key not in allowed | {"model_type", "attn_implementation"}:
            near = difflib.get_close_matches(str(key), allowed, n=3) or sorted(allowed)
            raise ValueError(f"{where} has an unknown key {key!r}; allowed are, for example, {', '.join(near)}")
    if values.get("model_type", config_class.model_type) != config_class.model_type:
        raise ValueError(f"{where}.model_type must be {config_class.model_type}, got {values['model_type']!r}")


def _without_type(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "model_type"}


def _build(make: Callable[[], T], config: Mapping[str, Any]) -> T:
    try:
        return make()
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config of the {config['model_type']} model has an impossible value: {reason}") from error
    except Exception as error:
        # A configuration whose parts do not fit fails anywhere in a model's code, with any exception.
        raise ValueError(
            f"config of the {config['model_type']} model gives no model that runs: {type(error).__name__}: "
            f"{error}; check the sizes of the layers and that the two towers fit together"
        ) from error


def _token_fields(tokenizer: PreTrainedTokenizerBase, text_model_type: str) -> dict[str, Any]:
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "tokenizer has no padding token, so captions of different lengths cannot form a batch; set its pad_token "
            "and save it, or choose another tokenizer"
        )
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if text_model_type in CLIP_TEXT_TOWERS:
        fields["eos_token_id"] = _end_token(tokenizer)
    return fields


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    # CLIP's text tower reads the embedding at the first eos_token_id; BERT-like tokenizers name it differently.
    end = tokenizer("a").input_ids[-1]
    if end not in tokenizer.all_special_ids:
        raise ValueError(
            "tokenizer adds no end token to a caption, and a CLIP text tower reads the embedding at that token; "
            "choose a tokenizer that adds one, or leave tokenizer unset to train one"
        )
    if end == 2:
        raise ValueError(
            "tokenizer ends captions with token 2, which transformers takes for the mark of old CLIP "
            "configurations, so that it reads the embedding at the largest id instead; choose another tokenizer, or "
            "leave it unset to train one"
        )
    return end


def _image_processor(vision_config: PreTrainedConfig) -> CLIPImageProcessorPil | Siglip2ImageProcessorPil:
    if hasattr(vision_config, "num_patches") and not hasattr(vision_config, "image_size"):
        return Siglip2ImageProcessorPil(
            patch_size=vision_config.patch_size,
            max_num_patches=vision_config.num_patches,
            resample=Image.Resampling.BILINEAR,
        )
    size = getattr(vision_config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    # Bilinear with antialiasing is a third faster than CLIP's bicubic on photographs. Cropping suits models that were
    # trained on crops; here it could remove what a caption mentions.
    return CLIPImageProcessorPil(
        size={"height": height, "width": width},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


@torch.no_grad()
def _check_forward(model: Any, processor: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = find_text_padding(model)
    texts = tokenizer(["a " * tokenizer.model_max_length], padding=padding, truncation=True, return_tensors="pt")
    if processor is tokenizer:
        images = {"pixel_values": torch.ones(1, model.config.vision_config.hidden_size)}
    else:
        images = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    image_embeds, text_embeds = model.get_image_features(**images), model.get_text_features(**texts)
    image_size, text_size = image_embeds.pooler_output.shape[-1], text_embeds.pooler_output.shape[-1]
    if image_size != text_size:
        raise ValueError(
            f"image embeddings have {image_size} dimensions and text embeddings {text_size}; for SigLIP "
            "set text_config.projection_size to vision_config.hidden_size, for ALIGN projection_dim to "
            "vision_config.hidden_dim"
        )
    model(**images, **texts)
