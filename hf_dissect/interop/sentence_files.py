"""The files by which sentence-transformers loads the folder of a dual encoder: small, next to the weights."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_dissect.models.adapters import find_adapted, find_base, get_active_adapter
from hf_dissect.models.families import bare_model, find_max_text_length, find_text_padding
from hf_dissect.models.feature_encoder import find_feature_size

MODULES_FILE, MODEL_FILE, ENCODER_FILE = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
OWN_ENCODER = "hf_dissect.interop.sentence_encoder.SentenceEncoder"
"""Class for what sentence-transformers cannot load by itself; it then asks for `trust_remote_code=True`."""
_ENCODER = "sentence_transformers.base.modules.transformer.Transformer"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
_LEAST_VERSION = ">=5.4"  # the first whose Transformer reads pictures


def write_sentence_files(folder: str | Path, model: nn.Module, processor: Any) -> None:
    """Write the files next to the weights of a model, unless it or its processor cannot be used there.

    Args:
        folder: Folder of the model.
        model: Dual encoder, wrapped or not, with or without an adapter.
        processor: Its processor.
    """
    files = describe_encoder(model, processor)
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_encoder(model: nn.Module, processor: Any) -> dict[str, Any]:
    """Return the content of each file by its name; nothing for a model that reads stored features.

    Args:
        model: Dual encoder, wrapped or not, with or without an adapter.
        processor: Its processor.
    """
    bare: Any = bare_model(model)
    reads_all = all(find_feature_size(bare, tower) is None for tower in ("vision", "text"))
    if not (reads_all and hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        return {}
    encoder = _ENCODER if find_hindrance(model) is None else OWN_ENCODER
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": encoder},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": _NORMALIZE},  # which has no files
    ]
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {part: _describe_method(bare, f"get_{part}_features") for part in ("text", "image")},
        "module_output_name": "sentence_embedding",
    }
    if processing := _describe_processing(bare, processor):
        settings["processing_kwargs"] = processing
    whole = {
        "model_type": "SentenceTransformer",
        "requirements": {"sentence-transformers": _LEAST_VERSION},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    return {MODULES_FILE: modules, MODEL_FILE: whole, ENCODER_FILE: settings}


def _describe_processing(bare: Any, processor: Any) -> dict[str, dict[str, Any]]:
    """Return what the processor must be called with, where its class has other settings than its two parts."""
    described, padding = {}, find_text_padding(bare)
    if padding == "max_length" or "max_length" in _read_defaults(processor, "text_kwargs"):
        length = find_max_text_length(bare, processor)
        described["text"] = {"padding": padding, "truncation": True, "max_length": length}
    pictures = {
        name: getattr(processor.image_processor, name)
        for name, default in _read_defaults(processor, "images_kwargs").items()
        if getattr(processor.image_processor, name, default) != default
    }
    return described | ({"image": pictures} if pictures else {})


def _read_defaults(processor: Any, part: str) -> dict[str, Any]:
    defaults = getattr(getattr(type(processor), "valid_processor_kwargs", None), "_defaults", {})
    own = getattr(type(processor), part, None)
    return {**defaults.get(part, {}), **(own if isinstance(own, dict) else {})}


def find_hindrance(model: nn.Module) -> str | None:
    """Return what keeps sentence-transformers from loading a saved model without code of ours; None for nothing.

    Args:
        model: Dual encoder, wrapped or not, with or without an adapter.
    """
    bare = bare_model(model)
    if not type(bare).__module__.startswith("transformers."):
        return f"the class {type(bare).__name__}, which transformers does not have"
    adapted: Any = find_adapted(model)
    if adapted is None:
        return None
    kind = str(getattr(adapted.peft_config[get_active_adapter(adapted)].peft_type, "value", "")).upper()
    if kind != "LORA":
        return f"an adapter of type {kind}, which transformers does not load into a dual encoder by itself"
    if not find_base(model):
        return "an adapter whose base model lies in the same folder"
    return None


def _describe_method(bare: Any, name: str) -> dict[str, Any]:
    # The two methods of a model of twins return the embeddings themselves.
    returned = getattr(type(bare), name).__annotations__.get("return")
    is_tensor = isinstance(returned, type) and not issubclass(returned, BaseModelOutputWithPooling)
    return {"method": name, "method_output_name": None if is_tensor else "pooler_output"}
