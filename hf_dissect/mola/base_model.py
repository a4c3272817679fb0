"""Facts about a base model: its default targets, its towers, and the dimension of its samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# The output projection of SigLIP's pooling head is left out: nn.MultiheadAttention reads its weight without a call.
_SIGLIP = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"]
_VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
_BERT = ["query", "key", "value", "dense"]
TARGET_MODULES: dict[str, Any] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "clip": _ATTENTION_AND_MLP,
    "clip_text_model": _ATTENTION_AND_MLP,
    "clip_vision_model": _ATTENTION_AND_MLP,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP,
    "chinese_clip": [*_ATTENTION_AND_MLP, *_BERT],
    "align": [*_BERT, "expand_conv", "project_conv"],
    "vision-text-dual-encoder": [*_ATTENTION_AND_MLP, "o_proj", *_BERT, "convolution"],
    "vit": _VIT,
    "resnet": ["convolution"],
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mpnet": ["q", "k", "v", "o", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": _ATTENTION_AND_MLP,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "dinov2": _VIT,
    "swin": _VIT,
    "convnext": ["pwconv1", "pwconv2"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}

# Modules of transformers that compute on `(L, B, D)`, and those inside such modules that do not.
_SEQUENCE_FIRST = {
    "modeling_longformer.LongformerSelfAttention": True,
    "modeling_led.LEDEncoderSelfAttention": True,
    "modeling_xlnet.XLNetModel": True,
    "modeling_fsmt.EncoderLayer": True,
    "modeling_fsmt.DecoderLayer": True,
    "modeling_oneformer.OneFormerTransformerDecoderFFNLayer": True,
    "modeling_oneformer.OneFormerAttention": False,
    "modeling_mask2former.Mask2FormerAttention": False,
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT_LAYERS = (nn.Embedding, nn.Linear, Conv1D, *_CONVOLUTIONS)


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a model that have an input of their own, by name.

    For an encoder-decoder, that is the encoder alone, which `generate` calls separately.

    Args:
        model: A base model of PEFT.

    Returns:
        The towers `"image"` and `"text"` of a dual encoder; for any other model the single tower `"model"`.
    """
    vision_model, text_model = getattr(model, "vision_model", None), getattr(model, "text_model", None)
    generates = is_causal_lm(model)
    if isinstance(vision_model, nn.Module) and isinstance(text_model, nn.Module) and not generates:
        return {"image": vision_model, "text": text_model}
    encodes_first = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"model": cast(PreTrainedModel, model).get_encoder() if encodes_first else model}


def is_sequence_first(model: nn.Module, module_name: str) -> bool:
    """Return True for a module that gets its input as `(L, B, D)`, as `batch_first=False` of torch means it.

    The innermost module around it decides that is known for its layout: by its `batch_first`, by that of an
    `nn.MultiheadAttention` next to the module, or by its class in transformers.

    Args:
        model: Base model.
        module_name: Name of the module in it.
    """
    names = module_name.split(".")
    around = [model]
    for name in names[:-1]:
        around.append(getattr(around[-1], name))
    for module in reversed(around):
        kind = type(module)
        known = _SEQUENCE_FIRST.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
        if known is not None:
            return known
        children = (
            child.get_base_layer() if isinstance(child, BaseTunerLayer) else child for child in module.children()
        )
        attention = (child for child in children if isinstance(child, nn.MultiheadAttention))
        batch_first = getattr(next(attention, module), "batch_first", None)
        if isinstance(batch_first, bool):
            return not batch_first
    return False


def find_default_targets(model: nn.Module) -> set[str] | None:
    """Return the default targets of a model that transformers does not know, for example a tower of open_clip.

    Args:
        model: Base model.

    Returns:
        Names of the attentions of torch and of the dense layers of their blocks; None if there are no such attentions.
    """
    attentions = {name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention}
    if not attentions:
        return None
    blocks = tuple("".join(name.rpartition(".")[:2]) for name in attentions)
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith(blocks)}
    return attentions | dense


def find_batch_dim(
    model: nn.Module, module_name: str, sequence_first: list[str] | str | None = None
) -> tuple[int, bool]:
    """Return the dimension of the samples in a module's input, and False if it could be another.

    Args:
        model: Base model.
        module_name: Name of the module in it.
        sequence_first: Modules whose input is `(L, B, D)`, names or a regular expression; None to find them.
    """
    if isinstance(sequence_first, str):
        return int(re.fullmatch(sequence_first, module_name) is not None), True
    if sequence_first is not None:
        return int(any(f".{module_name}".endswith(f".{name}") for name in sequence_first)), True
    first = is_sequence_first(model, module_name)
    return int(first), first


def is_causal_lm(model: nn.Module) -> bool:
    """Return True for a model that continues its own input, so that a router must not see all of it.

    Args:
        model: Base model.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate())


def choose_router_sources(router_input: str, towers: list[str]) -> dict[str, str]:
    """Return the router's input for each tower; only the image tower of a dual encoder can be routed by pixels.

    Args:
        router_input: `"pixels"` or `"embeddings"`, as configured.
        towers: Names of the towers.

    Returns:
        `"pixels"` or `"embeddings"` for each tower.
    """
    return {tower: "embeddings" if tower == "text" else router_input for tower in towers}


def has_reentrant_checkpoints(parts: Iterable[nn.Module]) -> bool:
    """Return True if gradient checkpointing of transformers is on, in its reentrant form.

    Args:
        parts: Modules with an attribute `gradient_checkpointing`.
    """
    for part in parts:
        if part.gradient_checkpointing:
            function = getattr(part, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def find_input_layer(module: nn.Module) -> nn.Module:
    """Return the first layer that sees a model's input.

    The layer is searched in the input embeddings if the model declares them, otherwise in all of its layers.

    Args:
        module: A tower.

    Raises:
        ValueError: If the module has no embedding, convolution or dense layer.
    """
    try:
        start = cast(PreTrainedModel, module).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        start = None
    for layer in (module if start is None else start).modules():  # a wrapper of timm has none
        if isinstance(layer, BaseTunerLayer):
            return layer.get_base_layer()  # the router must see the output before the layer's own adapter adds to it
        if isinstance(layer, (AuxiliaryTrainingWrapper, *_INPUT_LAYERS)):
            return layer
    raise ValueError(f"{type(module).__name__} has no embedding, convolution or dense layer that a router could read.")


def pool_output(layer: nn.Module, output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Average the output of an input layer over the positions of each sample.

    Args:
        layer: An embedding or dense layer, whose output is `(B, ..., D)`, or a convolution, `(B, D, ...)`.
        output: Output of that layer.
        mask: Mask `(B, L)` of an output `(B, L, D)`, 0 at padding; None to average over all positions.

    Returns:
        Mean embeddings `(B, D)`; zero without a position.
    """
    if isinstance(layer, _CONVOLUTIONS):
        return output.flatten(2).mean(2)
    if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2]:
        mask = mask.to(output.dtype)[:, :, None]
        return (output * mask).sum(1) / mask.sum(1).clamp_min(1)
    return output.flatten(1, -2).mean(1) if output.dim() > 2 else output


def get_output_dim(layer: nn.Module) -> int:
    """Return the number of channels or dimensions of an input layer's output.

    Args:
        layer: An embedding, convolution or dense layer.

    Raises:
        ValueError: If the layer has none of the known size attributes.
    """
    if isinstance(layer, AuxiliaryTrainingWrapper):
        layer = layer.original_module
    for attribute in ("embedding_dim", "out_channels", "out_features", "nf"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    raise ValueError(f"The size of the output of {layer} is unknown; register a router of your own for this model.")


def has_fixed_pixels(model: nn.Module) -> bool:
    """Return True if every call of a model gets images `(B, channels, height, width)`.

    A model that generates gets its images with the prompt only, if at all, and some models get patches.

    Args:
        model: Base model with an argument `pixel_values`.
    """
    if is_causal_lm(model):
        return False
    towers = find_towers(model)
    layer = find_input_layer(towers.get("image", next(iter(towers.values()))))
    return isinstance(layer, nn.Conv2d)


def get_num_channels(module: nn.Module) -> int:
    """Return the number of channels of the images that a tower takes; 3 if its configuration does not say."""
    config = getattr(module, "config", None)
    return getattr(getattr(config, "vision_config", config), "num_channels", 3)


def find_device_and_dtype(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and type of the weights of a base model, adapters aside; None twice without any."""
    adapter_parameters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer")
    }
    base = (parameter for parameter in model.parameters() if id(parameter) not in adapter_parameters)
    parameter = next((parameter for parameter in base if parameter.is_floating_point()), None)
    return (None, None) if parameter is None else (parameter.device, parameter.dtype)
