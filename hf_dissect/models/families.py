"""The differences between model families: towers, scale, padding and loss."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

TOWERS = {
    "vision": ("vision_model", "visual", "vision_tower", "image_encoder"),
    "text": ("text_model", "text_tower", "text_encoder"),
}
PADDED_TO_MAX_LENGTH = {"siglip", "siglip2", "siglip_text_model", "siglip2_text_model"}
# Positions start at pad_token_id + 1, so that a table of 514 rows reads 512 tokens.
POSITIONS_AFTER_PADDING = {
    "altclip_text_model",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
OUTPUTS = ("image_embeds", "text_embeds")
"""Outputs of a dual encoder that training and evaluation need, `(B, D)` each of unit length."""
LARGEST_LOG_SCALE = math.log(100)
TEMPERATURE_RANGE = (0.01, 1.0)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, FSDP, `torch.compile` and PEFT wrappers, or the model itself.

    Args:
        model: Model, wrapped or not.
    """
    bare: Any = model
    while not isinstance(bare, PreTrainedModel):
        if hasattr(bare, "get_base_model"):
            bare = bare.get_base_model()
        elif isinstance(getattr(bare, "_orig_mod", None), nn.Module):
            bare = bare._orig_mod
        elif isinstance(getattr(bare, "module", None), nn.Module):
            bare = bare.module
        else:
            return bare
    return bare


def list_networks(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the dual encoders that the model, wrapped or not, consists of: itself, or the two of twins."""
    bare = bare_model(model)
    return getattr(bare, "networks", (bare,))


def check_dual_encoder(model: nn.Module) -> None:
    """Check that the model, wrapped or not, embeds images and captions separately.

    Args:
        model: Model, wrapped or not.

    Raises:
        ValueError: If `get_image_features` or `get_text_features` is missing, or if the model declares outputs without
            embeddings; the message names which.
    """
    bare = bare_model(model)
    missing = [name for name in ("get_image_features", "get_text_features") if not callable(getattr(bare, name, None))]
    if missing:
        raise ValueError(
            f"model of class {type(bare).__name__} has no {' and no '.join(missing)}, so images and captions cannot "
            "be embedded separately; use a dual encoder, such as a CLIP, SigLIP, SigLIP 2, ALIGN, Chinese-CLIP or "
            "VisionTextDualEncoder model, or give your class these methods"
        )
    declared = _list_output_fields(bare)
    if declared and not any(fields.issuperset(OUTPUTS) for fields in declared.values()):
        raise ValueError(
            f"model of class {type(bare).__name__} returns {' or '.join(declared)}, without {', '.join(OUTPUTS)}; use "
            "a dual encoder, such as a CLIP model, or derive a class whose forward returns these (see transformers' "
            "CLIPOutput)"
        )


def _list_output_fields(bare: nn.Module) -> dict[str, set[str]]:
    """Return the fields of each kind of output that a model's forward pass declares, by the name of the kind."""
    annotation = inspect.signature(bare.forward).return_annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return {
        kind.__name__: {field.name for field in dataclasses.fields(kind)}
        for kind in kinds
        if issubclass(kind, ModelOutput) and dataclasses.is_dataclass(kind)
    }


def check_outputs(outputs: Any) -> None:
    """Check that a forward pass returned embeddings by their names.

    Args:
        outputs: Outputs of the forward pass.

    Raises:
        ValueError: They are a tuple, or one is missing.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"the model returns a {type(outputs).__name__}; it must name its outputs: set config.return_dict to True, "
            f"or return a dict with {', '.join(OUTPUTS)}"
        )
    if missing := [name for name in OUTPUTS if outputs.get(name) is None]:
        raise ValueError(
            f"the outputs of the model lack {', '.join(missing)} (it returns {', '.join(outputs)}); its forward must "
            "return them, as that of CLIP does"
        )


def check_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Check that a text tower has an embedding for each token of a tokenizer.

    Args:
        model: Dual encoder, wrapped or not.
        tokenizer: Tokenizer; one without a vocabulary is not checked.

    Raises:
        ValueError: It has fewer.
    """
    for network in list_networks(model):
        tower = next((part for name in TOWERS["text"] if (part := getattr(network, name, None)) is not None), None)
        try:
            size = cast(Any, tower).get_input_embeddings().weight.shape[0]
            largest = max(tokenizer.get_vocab().values())
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            continue  # a tower or a tokenizer of an unknown kind
        if largest >= size > 1:
            raise ValueError(
                f"the tokenizer has tokens up to number {largest}, but the text tower has embeddings for {size} only; "
                "use the model's own tokenizer, or add embeddings with resize_token_embeddings of the text tower"
            )


def freeze_tower(model: nn.Module, tower: str) -> int:
    """Freeze one tower in place, as in locked-image tuning ("LiT", arXiv 2111.07991, section 3).

    The tower keeps its weights and always runs in evaluation mode, because batch-norm statistics would drift
    otherwise, and dropout would change its output. The linear projection behind the tower is a layer of the model, not
    of the tower, and stays trainable. A family without one (the images of SigLIP and ALIGN) has that whole side
    frozen. Call this before wrapping in PEFT; adapters within the tower would be frozen, too.

    Args:
        model: Dual encoder, wrapped or not.
        tower: `"vision"` or `"text"`.

    Returns:
        The number of parameters (numbers, not tensors) in the frozen tower; for twins, in both of them.

    Raises:
        ValueError: If `tower` is neither of the two, or the model keeps its towers under unknown names.
    """
    if tower not in TOWERS:
        raise ValueError(f"freeze must be one of {', '.join(TOWERS)} or None, got {tower!r}")
    return sum(_freeze_tower(network, tower) for network in list_networks(model))


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


def is_frozen_tower(tower: nn.Module) -> bool:
    """Return True for a tower that `freeze_tower` keeps in evaluation mode."""
    return _stay_in_evaluation_mode in tower._forward_pre_hooks.values()


def _stay_in_evaluation_mode(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.eval()


def find_loss_kind(model: nn.Module) -> str:
    """Return `"sigmoid"` for a model with the bias of the sigmoid loss (SigLIP, SigLIP 2), otherwise `"softmax"`."""
    return "sigmoid" if isinstance(getattr(bare_model(model), "logit_bias", None), nn.Parameter) else "softmax"


def find_text_padding(model_or_config: nn.Module | PreTrainedConfig) -> str:
    """Return the `padding` to call a tokenizer with, `"max_length"` or `"longest"`.

    SigLIP reads the embedding off the last position and sees no attention mask, so its captions must be padded to the
    length of its training. All other families read a marked position, and any padding gives the same embedding.

    Args:
        model_or_config: Model, wrapped or not, or its configuration.
    """
    config = _config(model_or_config)
    types = {config.model_type, _text_config(config).model_type}
    return "max_length" if types & PADDED_TO_MAX_LENGTH else "longest"


def find_max_text_length(model_or_config: nn.Module | PreTrainedConfig, processor: Any = None) -> int:
    """Return the largest number of tokens in a caption, special tokens included.

    Args:
        model_or_config: Model or configuration, whose position table sets a limit.
        processor: Processor or tokenizer, whose `model_max_length` may be lower; None to ignore it.

    Raises:
        ValueError: If neither sets a limit.
    """
    text_config = _text_config(_config(model_or_config))
    positions = getattr(text_config, "max_position_embeddings", None)
    limits = [] if positions is None else [positions - count_reserved_positions(text_config)]
    tokenizer = getattr(processor, "tokenizer", processor)
    # A tokenizer without a limit reports 1e30.
    if tokenizer is not None and tokenizer.model_max_length < 1e9:
        limits.append(int(tokenizer.model_max_length))
    if not limits:
        raise ValueError(
            f"max_caption_length: neither the text tower ({text_config.model_type}) nor the tokenizer limits the "
            "length of a caption; set max_caption_length (model.max_caption_length in a recipe), for example to 64"
        )
    return min(limits)


def count_reserved_positions(text_config: PreTrainedConfig) -> int:
    """Return the number of rows of the position table that no token can use."""
    if text_config.model_type in POSITIONS_AFTER_PADDING:
        return (text_config.pad_token_id or 0) + 1
    return 0


def _config(model_or_config: nn.Module | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config
    return cast(PreTrainedConfig, bare_model(model_or_config).config)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return getattr(config, "text_config", config)


def logit_scale_parameter(model: nn.Module) -> nn.Parameter | None:
    """Return the learnt scale of the similarities in the form in which the model stores it.

    `logit_scale` holds the logarithm of the factor (CLIP, SigLIP, ...), `temperature` a divisor (ALIGN). The factor
    itself is returned by `logit_scale_and_bias`.

    Args:
        model: Dual encoder, wrapped or not.

    Returns:
        The parameter, or None for a model without one.
    """
    bare = bare_model(model)
    for name in ("logit_scale", "temperature"):
        parameter = getattr(bare, name, None)
        if isinstance(parameter, nn.Parameter):
            return parameter
    return None


def logit_scale_and_bias(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and bias of `logits = cosine * scale + bias`.

    Args:
        model: Dual encoder, wrapped or not.

    Returns:
        Two scalars with gradient; `(2,)` each for twins. The scale is 1 and the bias 0 in a model that does not learn
        them.
    """
    if len(list_networks(model)) > 1:
        scales, biases = zip(*map(logit_scale_and_bias, list_networks(model)), strict=True)
        return torch.stack(scales), torch.stack(biases)
    bare, parameter = bare_model(model), logit_scale_parameter(model)
    is_divisor = getattr(bare, "temperature", None) is parameter
    if parameter is None:
        scale = torch.ones((), device=next(bare.parameters()).device)
    elif is_divisor:
        scale = parameter.reciprocal().reshape(())
    else:
        scale = parameter.exp().reshape(())
    bias = getattr(bare, "logit_bias", None)
    return scale, torch.zeros_like(scale) if bias is None else bias.reshape(())


@torch.no_grad()
def clamp_logit_scale_(model: nn.Module) -> None:
    """Clamp a learnt softmax scale to [1, 100], in place; call it after each optimiser step.

    The bounds are `logit_scale` in [0, ln 100] (CLIP, arXiv 2103.00020, section 2.5) and ALIGN's `temperature` in
    [0.01, 1]. A frozen scale is not changed, and neither is that of a sigmoid model: SigLIP (arXiv 2303.15343) is
    trained without a bound, and its published checkpoints exceed 100.

    Args:
        model: Dual encoder, wrapped or not.
    """
    for network in list_networks(model):
        parameter = logit_scale_parameter(network)
        if parameter is None or not parameter.requires_grad or find_loss_kind(network) == "sigmoid":
            continue
        is_divisor = getattr(network, "temperature", None) is parameter
        if is_divisor:
            parameter.clamp_(*TEMPERATURE_RANGE)
        else:
            parameter.clamp_(0, LARGEST_LOG_SCALE)
