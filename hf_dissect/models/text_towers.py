"""Loading a trained text tower for a dual encoder, with its tokenizer and the pooling it was trained for."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from hf_dissect.models.dual_encoder import DualEncoder
from hf_dissect.models.families import find_text_padding
from hf_dissect.models.pretrained_parts import find_file, load_tokenizer
from hf_dissect.models.sentence_layers import apply_sentence_layers, load_sentence_layers
from hf_dissect.models.towers import drop_unused_pooler, pool_texts, take_encoder
from hf_dissect.models.vision_towers import (
    Tower,
    check_nothing_is_missing,
    load_feature_tower,
    load_tower,
    read_tower_config,
)

READ_AT_THE_END = {"clip_text_model", "siglip_text_model", "siglip2_text_model", "metaclip_2_text_model"}
"""Text towers whose own pooled output is that of the end of the text."""

_WHERE = "model.text.name_or_path"
# Keys of the file of sentence-transformers, and the pooling that each stands for.
_SENTENCE_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "eot",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "eot",
}


def load_text_tower(
    settings: Mapping[str, Any], feature_size: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tower:
    """Load the text tower of a section `model.text`, with its tokenizer.

    Args:
        settings: One of `name_or_path` (Hub id or local folder) and `features` (True), and `pooling` ("mean", "cls" or
            "eot"). Without a pooling, that of a sentence-transformers model is used; otherwise the end of the text
            for CLIP's and SigLIP's towers and for decoders, and the mean for the others. Dense layers of a
            sentence-transformers model are part of the tower.
        feature_size: Dimension of the stored features.
        tokenizer: Tokenizer to use in place of the tower's own.

    Raises:
        ValueError: If the settings are wrong, or the model is not a text tower, has weights missing or no tokenizer.
        OSError: If files cannot be read or downloaded.
    """
    if settings.get("features"):
        return load_feature_tower("text", feature_size)
    name = settings["name_or_path"]
    place = _find_place(name)
    config = read_tower_config(name, _WHERE, **place)
    model, missing, whole = load_tower(name, config, "text", _WHERE, **place)
    check_nothing_is_missing([key for key in missing if "pooler" not in key], name, _WHERE)
    asked = settings.get("pooling")
    pooling = asked or (whole.config.text_pooling if isinstance(whole, DualEncoder) else None)
    pooling = pooling or _read_sentence_pooling(name) or _choose_pooling(model.config)
    if pooling == "eot" and model.config.model_type in READ_AT_THE_END:
        pooling = "pooler"
    model = take_encoder(model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # of a decoder, whose cache nobody reads
    drop_unused_pooler(model, pooling)
    if whole is None:
        load_sentence_layers(model, name, _read_json(name, "modules.json") or [], _WHERE)
    tokenizer = load_tokenizer(name, _WHERE, **place) if tokenizer is None else tokenizer
    _prepare_tokenizer(tokenizer, name)
    return Tower(model.eval(), pooling, _measure(model, tokenizer, pooling, name), tokenizer)


def _find_place(name: str) -> dict[str, Any]:
    """Return the subfolder of the transformer in a sentence-transformers model, as keywords of `from_pretrained`."""
    for module in _read_json(name, "modules.json") or []:
        if str(module.get("type", "")).endswith(".Transformer"):
            return {"subfolder": module["path"]} if module.get("path") else {}
    return {}


def _read_sentence_pooling(name: str) -> str | None:
    """Return the pooling of a sentence-transformers model; None for any other model.

    Raises:
        ValueError: If its pooling is not offered here.
    """
    modules = _read_json(name, "modules.json") or []
    folder = next((part["path"] for part in modules if str(part.get("type", "")).endswith(".Pooling")), "1_Pooling")
    saved = _read_json(name, f"{folder}/config.json")
    if not saved:
        return None
    modes = [key for key, value in saved.items() if key.startswith("pooling_mode_") and value is True]
    modes = modes or [saved["pooling_mode"]] if saved.get("pooling_mode") else modes
    if not modes:
        return None
    if len(modes) > 1 or modes[0] not in _SENTENCE_POOLINGS:
        raise ValueError(
            f"model.text.pooling: {name!r} was trained with {' and '.join(map(str, modes))}, which is not offered; "
            "set model.text.pooling to mean, cls or eot"
        )
    return _SENTENCE_POOLINGS[modes[0]]


def _read_json(name: str, file: str) -> Any:
    path = find_file(name, file)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as text:
            return json.load(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{_WHERE} {name!r}: {file} is not readable JSON ({error}); set model.text.pooling"
        ) from error


def _choose_pooling(config: PreTrainedConfig) -> str:
    decodes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    is_decoder = (decodes and not config.is_encoder_decoder) or getattr(config, "is_decoder", False)
    return "eot" if is_decoder or config.model_type in READ_AT_THE_END else "mean"


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{_WHERE} {name!r}: its tokenizer has neither a padding token nor an end token, so captions of "
                "different lengths make no batch; set its pad_token and save it, or name one with model.tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides it
    # Decoders count positions from the left, so that padding there would change an embedding.
    tokenizer.padding_side = "right"
    limit = (_read_json(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    if isinstance(limit, int):
        tokenizer.model_max_length = min(limit, tokenizer.model_max_length)


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: str, name: str) -> int:
    """Return the dimension of the pooled output, and check that padding does not change it."""
    what = f"{_WHERE} {name!r} ({type(model).__name__})"
    vocabulary = getattr(model.config, "vocab_size", len(tokenizer))
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{what} knows {vocabulary} tokens, but its tokenizer has {len(tokenizer)}; use the tower's own tokenizer"
        )
    try:
        with torch.no_grad():
            texts = tokenizer("a dog", padding=find_text_padding(model), return_tensors="pt")
            output = model(input_ids=texts["input_ids"], attention_mask=texts.get("attention_mask"), return_dict=True)
            pooled = apply_sentence_layers(model, pool_texts(output, texts.get("attention_mask"), pooling))
    except Exception as error:  # a model of another modality fails anywhere, with any exception
        raise ValueError(f"{what} does not encode captions: {type(error).__name__}: {error}") from error
    return pooled.shape[-1]
