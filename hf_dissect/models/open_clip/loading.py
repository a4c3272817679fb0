"""Loading a checkpoint in open_clip's layout as a model of transformers."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel, SiglipModel, SiglipProcessor

from hf_dissect.models.open_clip.configuration import NotConvertible, build_config, set_special_tokens
from hf_dissect.models.open_clip.processors import build_image_processor, load_open_clip_tokenizer
from hf_dissect.models.open_clip.weights import to_transformers
from hf_dissect.models.pretrained_parts import find_file

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHTS_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def is_open_clip(name_or_path: str) -> bool:
    """Return True for a folder, or a repository of the Hub, that open_clip loads and transformers does not."""
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / CONFIG_FILE).is_file():
        return False
    if _is_for_transformers(name_or_path) or find_file(name_or_path, "adapter_config.json") is not None:
        return False
    return find_file(name_or_path, CONFIG_FILE) is not None


def _is_for_transformers(name_or_path: str) -> bool:
    file = find_file(name_or_path, "config.json")
    if file is None:
        return False
    try:
        return "model_type" in json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # whose error is transformers' own


def load_open_clip(name_or_path: str, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """Load a checkpoint in open_clip's layout.

    Args:
        name_or_path: Hub id or local folder.
        tokenizer: Tokenizer in place of the one of the checkpoint.

    Returns:
        A `CLIPModel` or a `SiglipModel` in float32, in evaluation mode and without a name, since transformers cannot
        load it by that of the checkpoint; and its processor.

    Raises:
        ValueError: transformers has no such model, or cannot prepare its inputs; the message names the setting.
        OSError: A file is missing or damaged, or cannot be downloaded.
    """
    try:
        content = _read_configuration(name_or_path)
        settings, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
        config: Any = build_config(settings)
        images = build_image_processor(config.model_type, config.vision_config.image_size, preprocess)
        tokenizer = tokenizer or load_open_clip_tokenizer(name_or_path, settings["text_cfg"])
        set_special_tokens(config, tokenizer)
        kind: Any = SiglipModel if config.model_type == "siglip" else CLIPModel
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
        weights = to_transformers(_read_weights(name_or_path), config, shapes)
    except NotConvertible as error:
        raise ValueError(
            f"name_or_path {name_or_path!r} is a checkpoint of open_clip that cannot become a model of transformers: "
            f"{error}. ViTs of CLIP with its text transformer, and SigLIP (vit_*_siglip_*), can; take one of these, "
            "or the same model in the layout of transformers"
        ) from error
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.name_or_path = model.config._name_or_path = ""  # so that an adapter is saved with its base
    processor = SiglipProcessor if config.model_type == "siglip" else CLIPProcessor
    return model.eval(), processor(images, tokenizer)


def _read_configuration(name_or_path: str) -> dict[str, Any]:
    file = Path(str(find_file(name_or_path, CONFIG_FILE)))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content["model_cfg"], dict):
            raise TypeError(f"model_cfg is a {type(content['model_cfg']).__name__}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OSError(
            f"name_or_path {name_or_path!r}: {CONFIG_FILE} cannot be read as a configuration of open_clip ({reason}); "
            "copy or download it again"
        ) from error
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(content["model_cfg"].get(name, {}), dict):
            raise NotConvertible(f"{name} is a {type(content['model_cfg'][name]).__name__}")
    return content


def _read_weights(name_or_path: str) -> dict[str, torch.Tensor]:
    file = next((file for name in _WEIGHTS_FILES if (file := find_file(name_or_path, name)) is not None), None)
    if file is None:
        raise OSError(
            f"name_or_path {name_or_path!r} has {CONFIG_FILE}, but no weights ({', '.join(_WEIGHTS_FILES)}); copy or "
            "download them, too"
        )
    try:
        return load_file(file) if file.endswith(".safetensors") else _load_pickled(file)
    except (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OSError(
            f"name_or_path {name_or_path!r}: {Path(file).name} is damaged or cut off ({reason}); copy or download it "
            "again"
        ) from error


def _load_pickled(file: str) -> dict[str, torch.Tensor]:
    loaded = torch.load(file, map_location="cpu", weights_only=True)  # which runs no code of the file
    if not isinstance(loaded, dict) or not all(isinstance(part, torch.Tensor) for part in loaded.values()):
        raise ValueError("it holds something other than weights by name")
    return loaded
