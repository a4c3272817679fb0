"""Configurations of open_clip and transformers, translated in both directions or refused by the setting at fault."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from transformers import CLIPConfig, PreTrainedConfig, SiglipConfig

from hf_dissect.models.open_clip.siglip_towers import SIGLIP_TOWERS, SiglipTower

Settings: TypeAlias = Mapping[str, Any]

_LAYER_NORM_EPS = 1e-5
_BLOCK = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "output_tokens": (False,),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
    ),
}
# Settings and the values with which transformers' models compute the same.
_VISION = {**_BLOCK, "attentional_pool": (False,), "no_ln_pre": (False,), "pool_type": ("tok",)}
_TIMM = {"timm_pool": ("map",), "timm_proj": ("none",), "output_tokens": (False,)}
_TEXT = {
    **_BLOCK,
    "hf_model_name": (None,),
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "tokenizer_mode": (None,),
}
_CLIP_TEXT = {**_TEXT, "no_causal_mask": (False,), "pool_type": ("argmax", "eos"), "proj_bias": (False,)}
_SIGLIP_TEXT = {**_TEXT, "no_causal_mask": (True,), "pool_type": ("last",), "proj_bias": (True,)}
# What open_clip takes for a setting that is left out.
_VISION_DEFAULTS = {name: allowed[0] for name, allowed in _VISION.items()} | {
    "timm_pool": "avg",
    "timm_proj": "linear",
}
_TEXT_DEFAULTS = {name: allowed[0] for name, allowed in _CLIP_TEXT.items()}
# Settings that are read below, belong to what is refused, or matter in training alone.
_READ_VISION = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"),
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "final_ln_after_pool"),
    *("timm_model_name", "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    *("timm_pool", "timm_proj"),
}
_READ_TEXT = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "pad_id", "eos_id", "final_ln_after_pool"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
_READ = {
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "output_dict"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
}


class NotConvertible(ValueError):
    """A model that the other library has no architecture for; the message names the setting."""


def build_config(model: Settings) -> PreTrainedConfig:
    """Translate the section `model_cfg` of open_clip's configuration.

    Args:
        model: Content of the section.

    Returns:
        Configuration of a `CLIPModel`, or of a `SiglipModel`; the special tokens are those of a tokenizer, which is
        not known here.

    Raises:
        NotConvertible: transformers has no such model, or a setting is unknown or missing.
    """
    if "multimodal_cfg" in model:
        raise NotConvertible("multimodal_cfg: a CoCa model, which also writes captions")
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if name not in model:
            raise NotConvertible(f"{name} is missing in model_cfg")
    vision, text = model["vision_cfg"], model["text_cfg"]
    if text.get("hf_model_name"):
        raise NotConvertible(f"text_cfg.hf_model_name={text['hf_model_name']!r}: a text tower of another model")
    _check_known(model, _READ, "model_cfg")
    if timm := vision.get("timm_model_name"):
        if timm not in SIGLIP_TOWERS:
            raise NotConvertible(f"vision_cfg.timm_model_name={timm!r}: a vision tower of timm other than SigLIP's")
        _check_values(vision, _TIMM, _READ_VISION | _VISION.keys(), "vision_cfg")
        _check_values(text, _SIGLIP_TEXT, _READ_TEXT, "text_cfg")
        return _build_siglip(model, SIGLIP_TOWERS[timm], vision, text)
    if isinstance(vision.get("layers"), list):
        raise NotConvertible(f"vision_cfg.layers={vision['layers']}: a ResNet (RN50 and the like)")
    _check_values(vision, _VISION, _READ_VISION, "vision_cfg")
    _check_values(text, _CLIP_TEXT, _READ_TEXT, "text_cfg")
    if model.get("init_logit_bias") is not None:
        raise NotConvertible(
            f"init_logit_bias={model['init_logit_bias']}: a ViT of CLIP with the bias of the sigmoid loss"
        )
    return _build_clip(model, vision, text)


def _build_clip(model: Settings, vision: Settings, text: Settings) -> CLIPConfig:
    width, quick = vision.get("width", 768), bool(model.get("quick_gelu", False))
    vision_config = {
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "image_size": _read_size(vision.get("image_size", 224), "image_size"),
        "patch_size": _read_size(vision.get("patch_size", 16), "patch_size"),
        "hidden_act": _read_activation(vision, "vision_cfg", quick),
        "layer_norm_eps": _read_eps(vision, "vision_cfg"),
    }
    text_config = _read_text(text, quick)
    text_config["eos_token_id"] = 2  # the largest number of a caption, see `set_special_tokens`
    if text.get("pool_type", "argmax") == "eos":
        text_config["eos_token_id"] = text.get("eos_id", 2)
        if text_config["eos_token_id"] == 2:
            raise NotConvertible("text_cfg.eos_id=2 with pool_type='eos'")
    dimension = model["embed_dim"]
    return CLIPConfig(
        text_config={**text_config, "projection_dim": dimension},
        vision_config={**vision_config, "projection_dim": dimension},
        projection_dim=dimension,
    )


def _build_siglip(model: Settings, tower: SiglipTower, vision: Settings, text: Settings) -> SiglipConfig:
    if model.get("quick_gelu"):
        raise NotConvertible("quick_gelu=True with a vision tower of timm")
    if model["embed_dim"] != tower.width:
        raise NotConvertible(f"embed_dim={model['embed_dim']}, where {vision['timm_model_name']} has {tower.width}")
    size = _read_size(vision.get("image_size", 224), "image_size")
    if size != tower.image_size:
        raise NotConvertible(f"vision_cfg.image_size={size}, where {vision['timm_model_name']} has {tower.image_size}")
    if model.get("init_logit_bias") is None:
        raise NotConvertible("init_logit_bias is missing: SigLIP without the bias of its loss")
    vision_config = {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": 1e-6,
    }
    text_config = {**_read_text(text, quick=False), "projection_size": tower.width}
    return SiglipConfig(text_config=text_config, vision_config=vision_config)


def _read_text(text: Settings, quick: bool) -> dict[str, Any]:
    width = text.get("width", 512)
    return {
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": _read_activation(text, "text_cfg", quick),
        "layer_norm_eps": _read_eps(text, "text_cfg"),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _check_values(section: Settings, allowed: Mapping[str, tuple], read: set[str], where: str) -> None:
    _check_known(section, read | allowed.keys(), where)
    for name, values in allowed.items():
        value = section.get(name, (_VISION_DEFAULTS if where == "vision_cfg" else _TEXT_DEFAULTS)[name])
        if value not in values:
            raise NotConvertible(f"{where}.{name}={value!r}")


def _check_known(section: Settings, known: set[str], where: str) -> None:
    if unknown := sorted(section.keys() - known):
        raise NotConvertible(f"{where}.{unknown[0]}={section[unknown[0]]!r}, a setting that is not known")


def _read_size(value: Any, name: str) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise NotConvertible(f"vision_cfg.{name}={value!r}, which is not square")
    return sides.pop()


def _read_activation(section: Settings, where: str, quick: bool) -> str:
    given = section.get("act_kwargs") or {}
    if quick and not given:
        return "quick_gelu"
    names = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    if quick or given.keys() - {"approximate"} or given.get("approximate", "none") not in names:
        raise NotConvertible(f"{where}.act_kwargs={given!r}" + (" with quick_gelu" if quick else ""))
    return names[given.get("approximate", "none")]


def _read_eps(section: Settings, where: str) -> float:
    given = section.get("norm_kwargs") or {}
    if given.keys() - {"eps"}:
        raise NotConvertible(f"{where}.norm_kwargs={given!r}")
    return float(given.get("eps", _LAYER_NORM_EPS))


def set_special_tokens(config: PreTrainedConfig, tokenizer: Any) -> None:
    """Write the special tokens of a tokenizer to the text configuration that `build_config` made.

    open_clip's CLIP reads a caption at its largest token. The first end token is the same place, if that token is the
    last one of the vocabulary; otherwise 2 stands for the largest token in transformers.
    """
    text: Any = config.get_text_config()
    text.bos_token_id, text.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    end = tokenizer.eos_token_id
    if config.model_type == "siglip" or (text.eos_token_id == 2 and end == max(tokenizer.get_vocab().values())):
        text.eos_token_id = end


def describe_config(config: PreTrainedConfig, context_length: int, largest_token: int) -> dict[str, Any]:
    """Translate the configuration of a `CLIPModel` or a `SiglipModel` to the section `model_cfg` of open_clip.

    Args:
        config: Configuration of the model.
        context_length: Number of tokens to which captions are cut and padded.
        largest_token: Largest token of the tokenizer.

    Raises:
        NotConvertible: open_clip has no such model.
    """
    if config.model_type not in ("clip", "siglip"):
        raise NotConvertible(
            f"a model of type {config.model_type!r}; those of type 'clip' and 'siglip' can be written"
        )
    sections: Any = config
    vision, text = sections.vision_config, sections.text_config
    if vision.num_channels != 3:
        raise NotConvertible(f"vision_config.num_channels={vision.num_channels}")
    described: dict[str, Any] = {
        "context_length": context_length,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_describe_mlp(text),
    }
    if config.model_type == "siglip":
        return _describe_siglip(vision, text, described)
    quick = vision.hidden_act == text.hidden_act == "quick_gelu"
    vision_cfg = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "layers": vision.num_hidden_layers,
        **_describe_mlp(vision),
        **_describe_block(vision, "vision_config", quick, 1e-5),
    }
    described |= _describe_block(text, "text_config", quick, 1e-5)
    if text.eos_token_id not in (2, largest_token):
        described |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    model = {"embed_dim": sections.projection_dim, "vision_cfg": vision_cfg, "text_cfg": described}
    return {**model, "quick_gelu": True} if quick else model


def _describe_siglip(vision: Any, text: Any, described: dict[str, Any]) -> dict[str, Any]:
    sizes = vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size
    tower = SiglipTower(*sizes, vision.patch_size, vision.image_size, vision.hidden_act)
    name = next((name for name, known in SIGLIP_TOWERS.items() if known == tower), None)
    if name is None or not vision.vision_use_head or vision.layer_norm_eps != 1e-6:
        raise NotConvertible(f"timm, from which open_clip takes SigLIP's vision tower, has none of the sizes {tower}")
    if text.projection_size != vision.hidden_size:
        raise NotConvertible(f"text_config.projection_size={text.projection_size}")
    vision_cfg = {"image_size": vision.image_size, "timm_model_name": name, "timm_model_pretrained": False}
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**vision_cfg, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **described,
            **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
            **_describe_block(text, "text_config", False, 1e-5),
        },
    }


def _describe_mlp(config: Any) -> dict[str, float]:
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:  # by rounding
        ratio = (config.intermediate_size + 0.5) / config.hidden_size
    return {} if ratio == 4 else {"mlp_ratio": ratio}


def _describe_block(config: Any, where: str, quick: bool, default_eps: float) -> dict[str, Any]:
    known = {"gelu": {}, "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}}}
    if not quick and config.hidden_act not in known:
        raise NotConvertible(f"{where}.hidden_act={config.hidden_act!r} in one of the two towers")
    norm = {} if config.layer_norm_eps == default_eps else {"norm_kwargs": {"eps": config.layer_norm_eps}}
    return {**({} if quick else known[config.hidden_act]), **norm}
