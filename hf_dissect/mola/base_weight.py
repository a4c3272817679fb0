"""The base weights of the adapted layers, quantised or not: access to them, and experts merged into them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import get_quantization_kwargs, quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.routing import MolaTunerLayer, Routing

_MISSING: Any = dict  # what a model quantised without transformers does not hold; it is never called
_KINDS = nn.Linear | nn.Conv2d | Conv1D | nn.MultiheadAttention
_TORCHAO_KEY = "get_apply_tensor_subclass"
_WAY_OUT = (
    "Quantise the model through transformers in a way that PEFT supports (bitsandbytes, torchao, HQQ, GPTQ, AWQ, "
    "AQLM, EETQ), load it unquantised, or leave the module out with `exclude_modules`."
)


def resolve_quantization_backend(target: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """Return PEFT's access to the weight of a quantised layer; None for a layer with a plain weight.

    Args:
        target: Layer to adapt, which another PEFT method may have wrapped.
        model: Base model that it belongs to.

    Raises:
        TypeError: If the weight is quantised in a way that PEFT cannot handle in this layer.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    known = get_quantization_kwargs(model)
    backend = quantization_utils.resolve_quantization_backend(base_layer, **{_TORCHAO_KEY: _MISSING} | known)
    if backend is not None and isinstance(base_layer, nn.Conv2d | Conv1D):
        raise TypeError(f"{base_layer} is quantised ({backend.backend_name}), which works in dense layers only.")
    if backend is not None:
        if backend.backend_name == "torchao" and _TORCHAO_KEY not in known:
            backend.supports_merge = False
        return backend
    if isinstance(base_layer, _KINDS) and (reason := _describe_quantization(base_layer)):
        kind = f"{type(base_layer).__module__}.{type(base_layer).__qualname__}"
        raise TypeError(f"{base_layer} ({kind}) is quantised in a way that PEFT does not know: {reason}. {_WAY_OUT}")
    return None


def check_trained_base(model: nn.Module, config: MolaConfig) -> None:
    """Raise a ValueError if an adapter would train parts of the base that cannot be trained in this way.

    Args:
        model: Base model.
        config: Configuration of the adapter.
    """
    if config.train_logit_scale and not hasattr(model, "logit_scale"):
        raise ValueError(f"train_logit_scale=True: {type(model).__name__} has no logit_scale.")
    if bare := {"logit_scale", "logit_bias"} & set(config.modules_to_save or ()):
        raise ValueError(
            f"modules_to_save names {', '.join(sorted(bare))}, which is a parameter and not a module: use "
            "train_logit_scale=True."
        )
    if config.train_base == "all":
        check_trainable(type(model).__name__, model)


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
    if isinstance(base_layer, nn.MultiheadAttention):
        if base_layer.in_proj_weight is None:
            return None  # three weights, which MoLA does not adapt
        return _describe_weight(base_layer.in_proj_weight) or _describe_quantization(base_layer.out_proj)
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


# ---- merging ----


class MergingLayer(MolaTunerLayer):
    """Base class of layers whose experts can be merged into their base weight, if it may be read and written."""

    routing: Routing
    mola_A: nn.ParameterDict
    mola_B: nn.ParameterDict
    mola_scaling: dict[str, float]
    _merged_task: dict[str, int]
    is_dense = False

    def get_delta_weight(self, adapter_name: str, task: int | None = None) -> torch.Tensor:
        """Compute the contribution of one task's expert to the base weight.

        Args:
            adapter_name: Name of the adapter.
            task: Index of the expert; None for the task fixed by `set_task`, or the default task.

        Returns:
            A tensor with the shape of the base weight and the type of the experts.

        Raises:
            ValueError: If `task` is None and the adapter has a router, or no task is fixed.
        """
        if task is None:
            task = self.routing.get_task_to_merge(adapter_name)
        if adapter_name not in self.mola_A:
            return torch.zeros_like(self.get_base_weight())  # an adapter of other layers of the model
        return self._compute_delta(adapter_name, task).to(self.mola_A[adapter_name].dtype)

    def _compute_delta(self, adapter_name: str, task: int) -> torch.Tensor:
        """Compute the delta weight in at least single precision."""
        A, B = self.mola_A[adapter_name][task], self.mola_B[adapter_name][task]
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self._as_weight(B.to(dtype) @ A.to(dtype).flatten(1), A) * self.mola_scaling[adapter_name]

    @torch.no_grad()
    def compute_merged_weight(self, tasks: dict[str, int]) -> torch.Tensor:
        """Return the base weight, dequantised if it is quantised, plus the experts of some adapters.

        Args:
            tasks: Task of each adapter to merge.

        Raises:
            ValueError: If the weight cannot be merged, or the sum is not finite.
        """
        merged = self._add_experts(tasks, 1)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(tasks)} seems to be broken; nothing was "
                "merged."
            )
        return merged

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the experts of the fixed tasks to the base weight.

        All adapters are added at once, so that a quantised weight is rounded once.

        Args:
            safe_merge: Check that the result is finite before it replaces the weight.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If an adapter has a router, no task is fixed, the merged weight would not be finite, or the
                base is quantised in a way that cannot be merged.
        """
        tasks = self.find_tasks_to_merge(check_adapters_to_merge(self, adapter_names))
        if not tasks:
            return
        check_mergeable(self)
        self.set_base_weight(self.compute_merged_weight(tasks) if safe_merge else self._add_experts(tasks, 1))
        self.merged_adapters.extend(tasks)
        self._merged_task.update(tasks)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged experts from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._add_experts(self._merged_task, -1))
        self.merged_adapters.clear()
        self._merged_task.clear()

    def find_tasks_to_merge(self, adapter_names: Iterable[str]) -> dict[str, int]:
        """Return the task to merge of each named adapter of this layer."""
        return {name: self.routing.get_task_to_merge(name) for name in adapter_names if name in self.mola_A}

    def _add_experts(self, tasks: dict[str, int], sign: int) -> torch.Tensor:
        restore_layout(self)
        weight = self.get_base_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name, task in tasks.items():
            merged = merged + sign * self._compute_delta(name, task).to(merged.device)
        # A quantised weight is rounded once; torchao gives it the type of what it is made of, other libraries do not.
        rounds = self.quantization_backend is None or self.quantization_backend.backend_name == "torchao"
        return merged.to(weight.dtype) if rounds else merged

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if PEFT can convert the adapter to LoRA, once a task is fixed by `set_task`.

        Args:
            adapter_name: Name of the adapter.

        Raises:
            TypeError: If LoRA would give other outputs, because the layer is not dense, or the base was trained.
        """
        config = self.routing.mola_config.get(adapter_name)
        if config is None:
            raise TypeError(
                f"There is no adapter {adapter_name!r} to convert; the model has "
                f"{', '.join(self.routing.mola_config)}."
            )
        if config.variant != "grad":
            warnings.warn(
                f"Adapter {adapter_name!r} has a router, whose weights depend on the input; a LoRA adapter cannot "
                "express it. Only adapters with variant='grad' can be converted.",
                stacklevel=2,
            )
            return False
        trained = [name for name in ("train_base", "train_logit_scale", "task_norms") if getattr(config, name)]
        if trained or not self.is_dense:
            reason = f"was trained with {trained[0]}" if trained else f"adapts {type(self.get_base_layer()).__name__}"
            raise TypeError(
                f"Adapter {adapter_name!r} {reason}, which a LoRA adapter of its dense layers does not express. Use "
                "set_task(task), merge_and_unload() and save the whole model instead."
            )
        return True

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Give a product `B A` the shape of the base weight; `A` is one expert's."""
        raise NotImplementedError


def check_merge(model: nn.Module, adapter_names: list[str], safe_merge: bool) -> None:
    """Raise a ValueError if adapters cannot be merged, before any layer is changed.

    Args:
        model: Base model.
        adapter_names: Names of the adapters.
        safe_merge: Check that all merged weights are finite, too.
    """
    for layer in (module for module in model.modules() if isinstance(module, MergingLayer)):
        with onload_layer(layer):
            tasks = layer.find_tasks_to_merge(name for name in adapter_names if name not in layer.merged_adapters)
            if tasks:
                check_mergeable(layer)
                if safe_merge:
                    layer.compute_merged_weight(tasks)


def can_convert(model: nn.Module, config: MolaConfig | None, adapter_name: str) -> bool:
    """Return True if PEFT can convert an adapter to LoRA, once its task is fixed.

    Args:
        model: Base model.
        config: Configuration of the adapter; None if there is no such adapter.
        adapter_name: Name of the adapter.
    """
    if config is None or config.variant != "grad":
        return False
    layers = (module for module in model.modules() if isinstance(module, MergingLayer))
    try:
        return all(layer.supports_lora_conversion(adapter_name) for layer in layers)
    except TypeError:
        return False


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
