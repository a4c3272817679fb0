"""What is known of the model families: their towers, their scale, their padding, their loss."""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

TOWERS = {
    "vision": ("vision_model", "visual", "vision_tower", "image_encoder"),
    "text": ("text_model", "text_tower", "text_encoder"),
}
PADDED_TO_MAX_LENGTH = {"siglip", "siglip2", "siglip_text_model", "siglip2_text_model"}
# Their positions are counted from pad_token_id + 1, so that a table of 514 rows reads 512 tokens.
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "altclip_text_model"}
LARGEST_LOG_SCALE = math.log(100)
TEMPERATURE_RANGE = (0.01, 1.0)


def bare_model(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP, FSDP, `torch.compile` and PEFT wrappers, or the model itself."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model
    return model


def networks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the dual encoders that the model, wrapped or not, consists of: itself, or the two of twins."""
    bare = bare_model(model)
    return getattr(bare, "networks", (bare,))


def check_dual_encoder(model: nn.Module) -> None:
    """Makes sure that the model, wrapped or not, embeds images and captions separately.

    Raises:
        ValueError: if `get_image_features` or `get_text_features` is missing; names which.
    """
    bare = bare_model(model)
    missing = [name for name in ("get_image_features", "get_text_features") if not callable(getattr(bare, name, None))]
    if missing:
        raise ValueError(
            f"model of class {type(bare).__name__} has no {' and no '.join(missing)}, so images and captions cannot "
            "be embedded separately; use a dual encoder, such as a CLIP, SigLIP, SigLIP 2, ALIGN, Chinese-CLIP or "
            "VisionTextDualEncoder model, or give your class these methods"
        )


def freeze_tower(model: nn.Module, tower: str) -> int:
    """Freezes one tower in place, as in locked-image tuning ("LiT", arXiv 2111.07991, section 3).

    The tower keeps its weights and, whatever mode the model is put into, runs in evaluation mode: batch-norm
    statistics would drift otherwise, and dropout would change what is meant to be fixed. The linear projection behind
    the tower is a layer of the model, not of the tower, and stays trainable; a family without one (the images of
    SigLIP and ALIGN) has that whole side fixed. Freeze before wrapping in PEFT: adapters within the tower would be
    frozen, too.

    Args:
        model: a dual encoder, wrapped or not.
        tower: "vision" or "text".

    Returns:
        How many parameters (numbers, not tensors) the frozen tower has; of twins, both towers.

    Raises:
        ValueError: if `tower` is neither, or the model keeps its towers under names that are not known.
    """
    if tower not in TOWERS:
        raise ValueError(f"freeze must be one of {', '.join(TOWERS)} or None, got {tower!r}")
    return sum(_freeze_tower(network, tower) for network in networks_of(model))


def _freeze_tower(bare: nn.Module, tower: str) -> int:
    modules = [getattr(bare, name) for name in TOWERS[tower] if isinstance(getattr(bare, name, None), nn.Module)]
    if not modules:
        raise ValueError(
            f"freeze={tower!r}: model of class {type(bare).__name__} has none of the attributes "
            f"{', '.join(TOWERS[tower])}; set requires_grad of the tower's parameters to False yourself "
            "and leave freeze unset"
        )
    modules[0].requires_grad_(False)
    modules[0].eval()
    modules[0].register_forward_pre_hook(_stay_in_evaluation_mode)
    return sum(parameter.numel() for parameter in modules[0].parameters())


def _stay_in_evaluation_mode(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.eval()


def contrastive_kind(model: nn.Module) -> str:
    """Returns "sigmoid" for a model that has the bias of the sigmoid loss (SigLIP, SigLIP 2), else "softmax"."""
    return "sigmoid" if isinstance(getattr(bare_model(model), "logit_bias", None), nn.Parameter) else "softmax"


def text_padding(model_or_config: nn.Module | PreTrainedConfig) -> str:
    """Returns the `padding` a tokenizer must be called with: "max_length" or "longest".

    SigLIP reads the embedding off the last position and sees no attention mask, so its captions must be padded to the
    length it was trained with. All others read a marked position and get the same embedding from any padding.
    """
    config = _config(model_or_config)
    types = {config.model_type, _text_config(config).model_type}
    return "max_length" if types & PADDED_TO_MAX_LENGTH else "longest"


def max_text_length(model_or_config: nn.Module | PreTrainedConfig, processor: Any = None) -> int:
    """Returns how many tokens a caption may have, the added ones included.

    Args:
        model_or_config: sets the limit by its position table.
        processor: a processor or a tokenizer, whose `model_max_length` may be lower; None does not ask it.

    Raises:
        ValueError: if neither sets a limit.
    """
    text_config = _text_config(_config(model_or_config))
    positions = getattr(text_config, "max_position_embeddings", None)
    limits = [] if positions is None else [positions - reserved_positions(text_config)]
    tokenizer = getattr(processor, "tokenizer", processor)
    # A tokenizer that knows no limit says 1e30.
    if tokenizer is not None and tokenizer.model_max_length < 1e9:
        limits.append(int(tokenizer.model_max_length))
    if not limits:
        raise ValueError(
            f"max_caption_length: neither the text tower ({text_config.model_type}) nor the tokenizer limits the "
            "length of a caption; set max_caption_length (model.max_caption_length in a recipe), for example to 64"
        )
    return min(limits)


def reserved_positions(text_config: PreTrainedConfig) -> int:
    """Returns how many rows of the position table no token can have."""
    if text_config.model_type in POSITIONS_AFTER_PADDING:
        return (text_config.pad_token_id or 0) + 1
    return 0


def _config(model_or_config: nn.Module | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config
    return bare_model(model_or_config).config


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return getattr(config, "text_config", config)


def logit_scale_parameter(model: nn.Module) -> nn.Parameter | None:
    """Returns the learnt scale of the similarities as the model stores it, or None.

    `logit_scale` holds the logarithm of the factor (CLIP, SigLIP, ...), `temperature` a divisor (ALIGN);
    `logit_scale_and_bias` gives the factor itself.
    """
    bare = bare_model(model)
    for name in ("logit_scale", "temperature"):
        if isinstance(getattr(bare, name, None), nn.Parameter):
            return getattr(bare, name)
    return None


def logit_scale_and_bias(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what makes logits of cosines, `logits = cosine * scale + bias`, as scalars with gradient.

    A model without a learnt scale has scale 1, one without a bias has bias 0. Of twins both are `(2,)`.
    """
    if len(networks_of(model)) > 1:
        return tuple(map(torch.stack, zip(*map(logit_scale_and_bias, networks_of(model)), strict=True)))
    bare, parameter = bare_model(model), logit_scale_parameter(model)
    if parameter is None:
        scale = torch.ones((), device=next(bare.parameters()).device)
    elif parameter is getattr(bare, "temperature", None):
        scale = parameter.reciprocal().reshape(())
    else:
        scale = parameter.exp().reshape(())
    bias = getattr(bare, "logit_bias", None)
    return scale, torch.zeros_like(scale) if bias is None else bias.reshape(())


@torch.no_grad()
def clamp_logit_scale_(model: nn.Module) -> None:
    """Keeps a learnt softmax scale within [1, 100], in place; to be called after each optimiser step.

    That is `logit_scale` within [0, ln 100] (CLIP, arXiv 2103.00020, section 2.5) and ALIGN's `temperature` within
    [0.01, 1]. A frozen scale is left alone, and so is that of a sigmoid model: SigLIP (arXiv 2303.15343) is trained
    without a bound, and its published checkpoints stand above 100.
    """
    for network in networks_of(model):
        parameter = logit_scale_parameter(network)
        if parameter is None or not parameter.requires_grad or contrastive_kind(network) == "sigmoid":
            continue
        if parameter is getattr(network, "temperature", None):
            parameter.clamp_(*TEMPERATURE_RANGE)
        else:
            parameter.clamp_(0, LARGEST_LOG_SCALE)
