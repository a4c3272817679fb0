"""The adapted layers: a base layer plus a weighted sum of low-rank experts, for all samples in one pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.quantized_base import check_mergeable, find_backend, restore_layout
from hf_dissect.mola.routing import MolaTunerLayer, Routing
from hf_dissect.mola.unused_experts import keep_unused_experts


class MolaLayer(nn.Module, MolaTunerLayer):
    """Base class of the adapted layers.

    For each adapter, a layer holds `mola_A` and `mola_B`. In a dense layer their shapes are `(E, r, in)` and
    `(E, out, r)`; in a convolution `(E, r, in / groups, height, width)` and `(E, out, r)`. One parameter holds all
    experts, so that an expert without a sample gets a gradient of zero instead of no gradient.

    Args:
        base_layer: Layer to adapt.
        routing: Source of the experts' weights, shared by all layers of a model.
        tower: Name of the tower that the layer belongs to.
        quantization_backend: Access to the weight of a quantised base layer; None for a plain weight.
    """

    adapter_layer_names = ("mola_A", "mola_B")
    other_param_names = ("mola_r", "mola_scaling", "mola_dropout")
    routing: Routing
    in_features: int | None
    out_features: int | None

    def __init__(
        self,
        base_layer: nn.Module,
        routing: Routing,
        tower: str,
        quantization_backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        object.__setattr__(self, "routing", routing)  # registered once, in the base model
        self.tower = tower
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.mola_A = nn.ParameterDict()
        self.mola_B = nn.ParameterDict()
        self.mola_dropout = nn.ModuleDict()
        self.mola_r: dict[str, int] = {}
        self.mola_scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_task: dict[str, int] = {}
        self.cast_input_dtype_enabled = True
        keep_unused_experts(self)

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: MolaConfig) -> None:
        """Add the experts of one adapter.

        Args:
            adapter_name: Name of the adapter.
            r: Rank of its experts in this layer.
            alpha: Numerator of the factor `alpha / r`.
            config: Configuration of the adapter.
        """
        shape_A, out_features = self._expert_shape()
        self.mola_r[adapter_name] = r
        self.mola_scaling[adapter_name] = alpha / r
        self.mola_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.mola_A[adapter_name] = nn.Parameter(torch.empty(config.num_experts, r, *shape_A))
        self.mola_B[adapter_name] = nn.Parameter(torch.empty(config.num_experts, out_features, r))
        self.reset_mola_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # The routing is not among the layers that PEFT visits if it has no routers, so it is told by those that are.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, in the routing as well.

        Args:
            adapter_names: Names of the adapters.
            inference_mode: Freeze them.
        """
        super().set_adapter(adapter_names, inference_mode)
        self.routing.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, in the routing as well.

        Args:
            enabled: True to switch them on.
        """
        super().enable_adapters(enabled)
        self.routing.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, from the routing as well.

        Args:
            adapter_name: Name of the adapter.
        """
        super().delete_adapter(adapter_name)
        self.routing.delete_adapter(adapter_name)

    def reset_mola_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Initialise every expert as LoRA does.

        Args:
            adapter_name: Name of the adapter.
            init_weights: True for Kaiming-uniform `A` and zero `B`; False for a random `B`, which has an effect at
                once.
        """
        for A, B in zip(self.mola_A[adapter_name], self.mola_B[adapter_name], strict=True):
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if init_weights:
                nn.init.zeros_(B)
            else:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))

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
                f"There is no adapter {adapter_name!r} to convert; the model has {', '.join(self.routing.mola_config)}."
            )
        if config.variant != "grad":
            warnings.warn(
                f"Adapter {adapter_name!r} has a router, whose weights depend on the input; a LoRA adapter cannot "
                "express it. Only adapters with variant='grad' can be converted.",
                stacklevel=2,
            )
            return False
        trained = [name for name in ("train_base", "train_logit_scale") if getattr(config, name)]
        if trained or not isinstance(self, Linear):
            reason = f"was trained with {trained[0]}" if trained else f"adapts {type(self.get_base_layer()).__name__}"
            raise TypeError(
                f"Adapter {adapter_name!r} {reason}, which a LoRA adapter of its dense layers does not express. Use "
                "set_task(task), merge_and_unload() and save the whole model instead."
            )
        return True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the base layer plus the weighted experts of the active adapters.

        Args:
            x: Input `(B, ..., in)` of a dense layer or `(B, in, height, width)` of a convolution.
            *args: Further arguments of the base layer.
            **kwargs: Further keyword arguments of the base layer.

        Returns:
            Output in the shape and type of the base layer's.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            self.routing.check_merged_task(self._merged_task)
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.mola_A:
                result = result + self._mixture(name, x)
        return result.to(dtype)

    def _mixture(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        A, B = self.mola_A[adapter_name], self.mola_B[adapter_name]
        scaling, r = self.mola_scaling[adapter_name], self.mola_r[adapter_name]
        x = self.mola_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        weights = self.routing.expert_weights(adapter_name, self.tower, len(x), A.dtype)
        if isinstance(weights, int):
            return self._up(self._down(x, A[weights]), B[weights] * scaling)
        if not weights.is_floating_point():
            weights = F.one_hot(weights, len(A)).to(torch.promote_types(A.dtype, torch.float32))
        # One adapter of rank E * r with weighted inner dimensions needs no weight matrix per sample.
        hidden = self._down(x, A.flatten(0, 1))
        return self._up(
            self._weigh(hidden, (weights * scaling).repeat_interleave(r, dim=1)), B.transpose(0, 1).flatten(1)
        )

    def __repr__(self) -> str:
        return "mola." + super().__repr__()

    def extra_repr(self) -> str:
        """Return what PEFT prints for a layer, with the kind of quantisation."""
        return quantization_extra_repr(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_unused_experts(self)  # a copied or unpickled layer is not made by __init__

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        """Return the shape of one expert's `A` without its rank, and the number of outputs of `B`."""
        raise NotImplementedError

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Give a product `B A` the shape of the base weight; `A` is one expert's."""
        raise NotImplementedError

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _weigh(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Multiply hidden values by the weights `(B, E * r)` of the samples."""
        raise NotImplementedError

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Linear(MolaLayer):
    """MoLA in a dense layer, `torch.nn.Linear` or the `Conv1D` of transformers."""

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        return (cast(int, self.in_features),), cast(int, self.out_features)

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return F.linear(x, A)

    def _weigh(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden * weights.to(hidden).reshape(len(weights), *[1] * (hidden.dim() - 2), -1)

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, B)


class Conv2d(MolaLayer):
    """MoLA in a convolution of any kernel, stride, padding, dilation and number of groups.

    The weight of a convolution, read as a matrix, is `(out, in / groups * height * width)`. The experts add `B A` to
    this matrix, so every group is reduced by the same `A`.
    """

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        weight = self._get_convolution().weight
        return tuple(weight.shape[1:]), weight.shape[0]

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return delta.reshape(len(delta), *A.shape[1:])

    def _get_convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        base_layer = self._get_convolution()
        return base_layer._conv_forward(x, A.repeat(base_layer.groups, 1, 1, 1), None)

    def _weigh(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        weights = weights.to(hidden).repeat(1, self._get_convolution().groups)
        return hidden * weights[:, :, None, None]

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.conv2d(hidden, B[:, :, None, None], groups=self._get_convolution().groups)


def wrap_layer(target: nn.Module, routing: Routing, tower: str, model: nn.Module) -> MolaLayer:
    """Wrap a module in the adapted layer of its kind.

    Args:
        target: Module to adapt, which another PEFT method may have wrapped.
        routing: Source of the experts' weights.
        tower: Name of the tower that the module belongs to.
        model: Base model, which knows how it was quantised.

    Raises:
        TypeError: If MoLA cannot adapt this kind of module.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = find_backend(base_layer, model)
    if backend is not None or isinstance(base_layer, nn.Linear | Conv1D):
        return Linear(target, routing, tower, backend)
    if isinstance(base_layer, nn.Conv2d):
        return Conv2d(target, routing, tower)
    raise TypeError(
        f"Target module {target} is not supported. MoLA adapts `torch.nn.Linear` (quantised or not), "
        "`torch.nn.Conv2d` and `transformers.pytorch_utils.Conv1D`; exclude others with `target_modules` or "
        "`exclude_modules`."
    )
