"""Folders in open_clip's layout, of models small enough for a test, made with or without its package."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.5},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 4, "layers": 2},
}
SIGLIP_TOWER = "vit_tiny_patch8_siglip_32"
SIGLIP: dict[str, Any] = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 32, "timm_model_name": SIGLIP_TOWER, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        **{
            "context_length": 16,
            "vocab_size": 26,
            "hf_tokenizer_name": "timm/none",
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
        **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
        **{"tokenizer_kwargs": {"clean": "canonicalize"}, "act_kwargs": {"approximate": "tanh"}},
    },
}


def changed(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A copy of a configuration with other settings; sections are updated, and other values replaced."""
    copied = copy.deepcopy(model)
    for name, value in sections.items():
        copied[name] = {**copied.get(name, {}), **value} if isinstance(value, dict) else value
    return copied


def write_configuration(folder: Path, model: dict[str, Any], **preprocess: Any) -> Path:
    """Write the configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    return folder


def write_folder(folder: Path, model: dict[str, Any], *, pickled: bool = False, **preprocess: Any) -> Path:
    """Build a model with open_clip, with all weights random, and write its folder without a tokenizer."""
    from open_clip.model import CLIP as Clip
    from open_clip.model import CustomTextCLIP

    write_configuration(folder, model, **preprocess)
    torch.manual_seed(0)
    settings = copy.deepcopy(model)
    built = (CustomTextCLIP if settings.pop("custom_text", False) else Clip)(**settings)
    for parameter in built.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if pickled:
        torch.save(built.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(built.state_dict(), folder / "open_clip_model.safetensors")
    return folder
