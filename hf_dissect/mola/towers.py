"""Where the input comes into a model: its towers, and the layer of each that sees the input first."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT_LAYERS = (nn.Embedding, nn.Linear, Conv1D, *_CONVOLUTIONS)


def towers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model with an input of their own: `image` and `text` of a dual encoder, else the `model`.

    Of an encoder with a decoder it is the encoder that sees the input; `generate` calls it by itself.
    """
    vision_model, text_model = getattr(model, "vision_model", None), getattr(model, "text_model", None)
    if isinstance(vision_model, nn.Module) and isinstance(text_model, nn.Module):
        return {"image": vision_model, "text": text_model}
    encodes_first = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"model": model.get_encoder() if encodes_first else model}


def router_sources(router_input: str, towers: list[str]) -> dict[str, str]:
    """Tower -> "pixels" or "embeddings": of a dual encoder, only the image tower can be routed by pixels."""
    return {tower: "embeddings" if tower == "text" else router_input for tower in towers}


def input_layer(module: nn.Module) -> nn.Module:
    """The first layer that sees a model's input: of its input embeddings where it tells them, else of all its layers.

    Raises:
        ValueError: there is none.
    """
    try:
        start = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        start = module
    for layer in start.modules():
        if isinstance(layer, BaseTunerLayer):
            return layer.get_base_layer()  # the router must have looked before the layer's own adapter adds to it
        if isinstance(layer, (AuxiliaryTrainingWrapper, *_INPUT_LAYERS)):
            return layer
    raise ValueError(f"{type(module).__name__} has no embedding, convolution or dense layer for a router to look at.")


def pool(layer: nn.Module, output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean `(B, D)` of what an input layer makes of each sample.

    Args:
        layer: an embedding or dense layer, whose output is `(B, ..., D)`, or a convolution, `(B, D, ...)`.
        output: of the layer.
        mask: `(B, L)`, 0 where the positions of `(B, L, D)` are padding.
    """
    if isinstance(layer, _CONVOLUTIONS):
        return output.flatten(2).mean(2)
    if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2]:
        mask = mask.to(output.dtype)[:, :, None]
        return (output * mask).sum(1) / mask.sum(1).clamp_min(1)
    return output.flatten(1, -2).mean(1) if output.dim() > 2 else output


def output_dim(layer: nn.Module) -> int:
    """The number of channels or dimensions of an input layer's output.

    Raises:
        ValueError: the layer does not tell.
    """
    if isinstance(layer, AuxiliaryTrainingWrapper):
        layer = layer.original_module
    for attribute in ("embedding_dim", "out_channels", "out_features", "nf"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    raise ValueError(f"The size of the output of {layer} is unknown; register a router of your own for this model.")


def num_channels(module: nn.Module) -> int:
    """The number of channels of the images that a tower takes."""
    config = getattr(module, "config", None)
    return getattr(getattr(config, "vision_config", config), "num_channels", 3)
