"""Towers of a dual encoder: built from their configurations, and pooled to one vector an input."""

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

VISION_POOLINGS = ("pooler", "cls", "mean")
TEXT_POOLINGS = ("mean", "cls", "eot", "pooler")


def make_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a vision tower with random weights from its configuration."""
    return find_tower_class(config)._from_config(config, dtype=torch.get_default_dtype())


def make_text_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a text tower with random weights from its configuration; the encoder alone of an encoder-decoder."""
    # In the current type, whatever that of the saved tower was.
    return take_encoder(find_tower_class(config)._from_config(config, dtype=torch.get_default_dtype()))


def take_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder of an encoder-decoder, or of a model that has only kept its encoder (T5); otherwise it."""
    own_class: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(model.config), None)
    kept: Any = own_class if type(model) is own_class else None
    has_kept_encoder = kept is not None and kept is not MODEL_MAPPING.get(type(model.config), None)
    return model.get_encoder() if has_kept_encoder or model.config.is_encoder_decoder else model


def find_tower_class(config: PreTrainedConfig) -> Any:
    """Return the class of a tower with this configuration, for T5 and its kin the class of the encoder alone.

    Raises:
        ValueError: If transformers has no model for this configuration.
    """
    whole = MODEL_MAPPING.get(type(config), None)
    # The towers of SigLIP and others are in no mapping, but are named like their configurations.
    named = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    found = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), whole) or named
    if found is None:
        raise ValueError(f"a model of type {config.model_type} cannot be a tower: transformers has no class for it")
    return found


def drop_unused_pooler(tower: PreTrainedModel, pooling: str) -> None:
    """Remove the pooling layer of a tower, in place, if another pooling is used: its weights would never train."""
    if pooling != "pooler" and "add_pooling_layer" in inspect.signature(type(tower).__init__).parameters:
        tower.pooler = None  # type: ignore[assignment]  # as its own constructor does


def pool_images(output: Any, pooling: str) -> torch.Tensor:
    """Pool the output of a vision tower to `(B, D)`, see `DualEncoderConfig.vision_pooling`."""
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    states = output.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    return states.flatten(2).mean(2) if states.dim() == 4 else states.mean(1)


def pool_texts(output: Any, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Pool the output of a text tower, on whichever side its tokens are padded.

    Args:
        output: Output of the tower, with `last_hidden_state` `(B, L, D)`.
        attention_mask: 0 at padding, `(B, L)`; None if there is none.
        pooling: One of `TEXT_POOLINGS`.

    Returns:
        Pooled states `(B, D)`.
    """
    if pooling == "pooler":
        return output.pooler_output
    states = output.last_hidden_state
    used = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if attention_mask is not None:
        used = attention_mask != 0
    if pooling == "mean":
        weights = used.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    place = torch.arange(states.shape[1], device=states.device)
    if pooling == "cls":
        chosen = torch.where(used, place, states.shape[1] - 1).amin(1)
    else:
        chosen = torch.where(used, place, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), chosen]
