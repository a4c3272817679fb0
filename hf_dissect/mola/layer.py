"""The adapted layers: a base layer plus a weighted sum of low-rank experts, for all samples in one pass."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import quantization_extra_repr
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola.base_weight import MergingLayer
from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.routing import Routing
from hf_dissect.mola.unused_experts import keep_unused_experts, list_layers


class MolaLayer(nn.Module, MergingLayer):
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
            alpha: Numerator of the factor `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`.
            config: Configuration of the adapter.
        """
        shape_A, out_features = self._expert_shape()
        self.mola_r[adapter_name] = r
        self.mola_scaling[adapter_name] = alpha / (math.sqrt(r) if config.use_rslora else r)
        self.mola_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.mola_A[adapter_name] = nn.Parameter(torch.empty(config.num_experts, r, *shape_A))
        self.mola_B[adapter_name] = nn.Parameter(torch.empty(config.num_experts, out_features, r))
        self.reset_mola_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        Args:
            adapter_names: Names of the adapters.
            inference_mode: Freeze them.
        """
        super().set_adapter(adapter_names, inference_mode)
        self.routing.follow(self, list_layers(self.routing))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off.

        Args:
            enabled: True to switch them on.
        """
        super().enable_adapters(enabled)
        self.routing.follow(self, list_layers(self.routing))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Args:
            adapter_name: Name of the adapter.
        """
        super().delete_adapter(adapter_name)
        self.routing.delete_adapter(adapter_name)
        self.routing.follow(self, list_layers(self.routing))

    def train(self, mode: bool = True) -> MolaLayer:
        """Set the mode, of the routing as well until a pass begins, which has the mode of the model.

        Args:
            mode: True to train.
        """
        if not self.routing.mola_router:
            self.routing.training = mode
        return super().train(mode)

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

    def _mixture(self, adapter_name: str, x: torch.Tensor, outputs: slice = slice(None)) -> torch.Tensor:
        """Compute the weighted sum of an adapter's experts, or of some of its outputs."""
        A, B = self.mola_A[adapter_name], self.mola_B[adapter_name][:, outputs]
        scaling = self.mola_scaling[adapter_name]
        x = self.mola_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        weights = self._expert_weights(adapter_name, x, A.dtype)
        if isinstance(weights, int):
            return self._up(self._down(x, A[weights]), B[weights] * scaling)
        if weights.dtype == torch.int64:
            return self._mix_tasks(x, A, B, weights, scaling)
        return self._mix_all(x, A, B, weights * scaling)

    def _expert_weights(self, adapter_name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | int:
        """Return the experts of the samples; each serves as many rows of `x` in succession as a sample has."""
        return self.routing.expert_weights(adapter_name, self.tower, len(x), dtype, repeat=False)

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

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _mix_tasks(
        self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, tasks: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Compute one expert for each sample.

        Args:
            x: Input.
            A: Experts `(E, r, ...)`.
            B: Experts `(E, out, r)`.
            tasks: Expert of each sample, int64 `(S,)`; a sample has one row of `x` or several in succession.
            scaling: Factor of the result.
        """
        raise NotImplementedError

    def _mix_all(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the sum of all experts with the weights `(S, E)` of each sample, or `(1, E)` of all samples.

        It is one adapter of rank E * r, so no weight matrix per sample is built.
        """
        raise NotImplementedError


# A batch of matrix products is slower than one product with all experts where each sample has few positions.
_FEW_PRODUCTS = 64


class Linear(MolaLayer):
    """MoLA in a dense layer, `torch.nn.Linear` or the `Conv1D` of transformers.

    Attributes:
        batch_dim: Dimension of the samples in its input, 1 for an input `(L, B, D)`.
        knows_batch_dim: False if that may be wrong, so that doubtful inputs are refused.
    """

    is_dense = True
    batch_dim = 0
    knows_batch_dim = False

    def _expert_weights(self, adapter_name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | int:
        rows = x.shape[self._find_batch_dim(x)]
        doubtful: int | bool | None = True if self.batch_dim else None
        if not self.knows_batch_dim and x.dim() > 2:
            doubtful = x.shape[1]
        return self.routing.expert_weights(adapter_name, self.tower, rows, dtype, doubtful, repeat=False)

    def _find_batch_dim(self, x: torch.Tensor) -> int:
        return self.batch_dim if x.dim() > 2 else 0

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        return (cast(int, self.in_features),), cast(int, self.out_features)

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return F.linear(x, A)

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, B)

    def _mix_tasks(
        self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, tasks: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        batch_dim = self._find_batch_dim(x)
        by_sample = x.movedim(batch_dim, 0)
        *shape, in_features = by_sample.shape
        positions = math.prod(shape) // len(tasks)
        if len(A) * positions <= _FEW_PRODUCTS:
            return self._mix_all(x, A, B, F.one_hot(tasks, len(A)).to(A.dtype) * scaling)
        hidden = by_sample.reshape(len(tasks), positions, in_features) @ A.index_select(0, tasks).mT
        output = hidden * scaling @ B.index_select(0, tasks).mT
        return output.reshape(*shape, -1).movedim(0, batch_dim)

    def _mix_all(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        hidden = self._down(x, A.flatten(0, 1))
        batch_dim = self._find_batch_dim(x)
        before, (rows, *after, _) = hidden.shape[:batch_dim], hidden.shape[batch_dim:]
        samples, num_experts = weights.shape
        # The weights of a sample serve all its rows, all further dimensions and all ranks of an expert.
        by_sample = hidden.reshape(*before, samples, rows // samples, *after, num_experts, -1)
        weights = weights.to(hidden).view(samples, *[1] * (len(after) + 1), num_experts, 1)
        return self._up((by_sample * weights).reshape(hidden.shape), B.transpose(0, 1).flatten(1))


# Adapted form of each class of layers; that of others is added where it is defined.
LAYERS: dict[type[nn.Module], type[MolaLayer]] = {nn.Linear: Linear, Conv1D: Linear}


def wrap_layer(
    target: nn.Module, routing: Routing, tower: str, quantization_backend: QuantizationBackend | None = None
) -> MolaLayer:
    """Wrap a module in the adapted layer of its kind.

    Args:
        target: Module to adapt, which another PEFT method may have wrapped.
        routing: Source of the experts' weights.
        tower: Name of the tower that the module belongs to.
        quantization_backend: Access to the weight of a quantised module; None for a plain weight.

    Raises:
        TypeError: If MoLA cannot adapt this kind of module.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if quantization_backend is not None:
        return Linear(target, routing, tower, quantization_backend)
    for base_class, layer_class in LAYERS.items():
        if isinstance(base_layer, base_class):
            return layer_class(target, routing, tower)
    raise TypeError(
        f"Target module {target} is not supported. MoLA adapts `torch.nn.Linear`, `torch.nn.Conv2d`, "
        "`torch.nn.MultiheadAttention` and `transformers.pytorch_utils.Conv1D`; exclude others with `target_modules` "
        "or `exclude_modules`."
    )
