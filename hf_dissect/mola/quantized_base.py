"""Base layers with quantised weights: those that PEFT can read and write, and the refusal of all others."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

_TORCHAO_KEY = "get_apply_tensor_subclass"
_WAY_OUT = (
    "Quantise the model through transformers in a way that PEFT supports (bitsandbytes, torchao, HQQ, GPTQ, AWQ, AQLM, "
    "EETQ), load it unquantised, or leave the module out with `exclude_modules`."
)


def find_backend(base_layer: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """Return PEFT's access to the weight of a quantised layer; None for a layer with a plain weight.

    Args:
        base_layer: Layer to adapt.
        model: Base model that it belongs to.

    Raises:
        TypeError: If the weight is quantised in a way that PEFT cannot handle in this layer.
    """
    known = get_quantization_kwargs(model)
    backend = resolve_quantization_backend(base_layer, **{_TORCHAO_KEY: _refuse_to_quantize} | known)
    if backend is not None and isinstance(base_layer, nn.Conv2d | Conv1D):
        raise TypeError(f"{base_layer} is quantised ({backend.backend_name}), which works in dense layers only.")
    if backend is not None:
        if backend.backend_name == "torchao" and _TORCHAO_KEY not in known:
            backend.supports_merge = False
        return backend
    if isinstance(base_layer, nn.Linear | nn.Conv2d | Conv1D) and (reason := _describe_quantization(base_layer)):
        kind = f"{type(base_layer).__module__}.{type(base_layer).__qualname__}"
        raise TypeError(f"{base_layer} ({kind}) is quantised in a way that PEFT does not know: {reason}. {_WAY_OUT}")
    return None


def restore_layout(layer: BaseTunerLayer) -> None:
    """Give a base weight of 4 bits the layout in which PEFT reads it.

    For some processors, the first pass in evaluation mode changes the layout of bitsandbytes' weights. PEFT would read
    other numbers out of it.

    Args:
        layer: Adapted layer.
    """
    base_layer: Any = layer.get_base_layer()
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base_layer.state_dict()  # before it saves a weight, bitsandbytes restores the layout
        state = base_layer.weight.quant_state
        if state.absmax.dim() == 2:  # all but the order of the blocks' maxima
            state.absmax = state.absmax.T.reshape(-1).to(torch.float32).contiguous()


def check_mergeable(layer: BaseTunerLayer) -> None:
    """Raise a ValueError if the base weight of a layer cannot be read, or cannot be written again.

    Args:
        layer: Adapted layer.
    """
    backend, base_layer = layer.quantization_backend, layer.get_base_layer()
    if backend is None:
        return
    reason = None
    if not backend.supports_merge:
        reason = "PEFT cannot quantise the merged weight again"
        if backend.backend_name == "torchao":
            reason += "; it can if the base is loaded through transformers with a TorchAoConfig"
    elif backend.backend_name == "torchao":  # whose kinds of weights do not all implement it
        try:
            backend.get_base_weight(base_layer)
        except NotImplementedError as error:
            reason = str(error)
    if reason is not None:
        raise ValueError(
            f"Experts cannot be merged into {base_layer}, which is quantised ({backend.backend_name}): {reason}. Use "
            "the adapter without merging it, or merge it into the model loaded unquantised."
        )


def check_trainable(name: str, module: nn.Module) -> None:
    """Raise a ValueError if a part of the base that `train_base` would train is quantised.

    Args:
        name: Name of the module in the message.
        module: A layer, or a whole model.
    """
    for parameter_name, parameter in module.named_parameters():
        if reason := _describe_weight(parameter):
            raise ValueError(
                f"train_base: {parameter_name} of {name} cannot be trained, because {reason}. Use train_base=False, "
                "or load the model unquantised."
            )


def _describe_quantization(base_layer: nn.Module) -> str | None:
    weight = getattr(base_layer, "weight", None)
    if not torch.is_tensor(weight):
        return "it has no weight"
    if reason := _describe_weight(weight):
        return reason
    if isinstance(base_layer, nn.Linear) and not hasattr(weight, "ds_shape"):  # DeepSpeed keeps a part only
        expected = (base_layer.out_features, base_layer.in_features)
        if tuple(weight.shape) != expected:
            return f"its weight has the shape {tuple(weight.shape)} instead of {expected}"
    # A weight that is stored as usual and rounded in each forward pass, as in quantisation-aware training.
    names = [*vars(base_layer), *base_layer._parameters, *base_layer._buffers, *base_layer._modules]
    signs = [name for name in names if re.search(r"quant(?!ile|ity|um)|^weight_scale", name)]
    return f"it has the attribute {signs[0]}" if signs else None


def _describe_weight(weight: torch.Tensor) -> str | None:
    if isinstance(weight, DTensor):
        weight = weight._local_tensor
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is stored as {weight.dtype}"
    return None


def _refuse_to_quantize() -> Any:
    """Stand for the configuration of torchao that a model quantised without transformers does not hold."""
    raise ValueError("The configuration with which torchao quantised this model is not known.")
