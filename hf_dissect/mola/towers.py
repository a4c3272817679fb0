"""The towers of a model, and the layer of each that sees the input first."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
    if isinstance(vision_model, nn.Module) and isinstance(text_model, nn.Module):
        return {"image": vision_model, "text": text_model}
    encodes_first = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"model": cast(PreTrainedModel, model).get_encoder() if encodes_first else model}


def choose_router_sources(router_input: str, towers: list[str]) -> dict[str, str]:
    """Return the router's input for each tower; only the image tower of a dual encoder can be routed by pixels.

    Args:
        router_input: `"pixels"` or `"embeddings"`, as configured.
        towers: Names of the towers.

    Returns:
        `"pixels"` or `"embeddings"` for each tower.
    """
    return {tower: "embeddings" if tower == "text" else router_input for tower in towers}


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
        start = module
    for layer in start.modules():
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
        mask: Attention mask `(B, L)` of an output `(B, L, D)`, 0 at padding; None to average over all positions.

    Returns:
        Mean embeddings `(B, D)`.
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
