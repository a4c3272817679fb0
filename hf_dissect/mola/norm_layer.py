"""The adapted normalisation layers, and their way into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_adapters_to_merge,
    check_target_module_exists,
)
from torch import nn

from hf_dissect.mola.base_model import find_batch_dim
from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.routing import MolaTunerLayer, Routing
from hf_dissect.mola.task_norms import BATCH_NORMS, STATISTICS, TaskBatchNorm, TaskNorm, find_kind
from hf_dissect.mola.unused_experts import keep_unused_experts


class MolaNorm(nn.Module, MolaTunerLayer):
    """A normalisation layer with affine and statistics for each expert of the adapters that have `task_norms`.

    Args:
        base_layer: Normalisation layer to adapt.
        routing: Source of the experts' weights, shared by all layers of a model.
        tower: Name of the tower that the layer belongs to.

    Attributes:
        batch_dim: Dimension of the samples in the input, 1 for an input `(L, B, D)`.
        knows_batch_dim: False if that may be wrong, so that doubtful inputs are refused.
    """

    adapter_layer_names = ("mola_norm",)
    routing: Routing
    batch_dim = 0
    knows_batch_dim = False
    in_features = out_features = None  # PEFT asks every tuner layer, but this one has one size

    def __init__(self, base_layer: nn.Module, routing: Routing, tower: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        object.__setattr__(self, "routing", routing)  # registered once, in the base model
        self.tower = tower
        self.mola_norm = nn.ModuleDict()
        self.training = base_layer.training
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters: list[str] = []
        self._merged_task: dict[str, int] = {}
        self._unmerged: dict[str, torch.Tensor] = {}
        keep_unused_experts(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_unused_experts(self)  # a copied or unpickled layer is not made by __init__

    def update_layer(self, adapter_name: str, num_experts: int) -> None:
        """Add affine and statistics of one adapter's experts.

        Args:
            adapter_name: Name of the adapter.
            num_experts: Number of its experts.
        """
        base = self.get_base_layer()
        norm = (TaskBatchNorm if isinstance(base, BATCH_NORMS) else TaskNorm)(base, num_experts)
        self.mola_norm[adapter_name] = norm.train(self.training)
        # It normalises in place of the base, whose own affine gets no gradient.
        self.base_layer.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        Args:
            adapter_names: Name or names of the adapters.
            inference_mode: Freeze the adapters.

        Raises:
            ValueError: If several of them have a normalisation of their own here: a sample has one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_one([name for name in names if name in self.mola_norm], "activate")
        super().set_adapter(adapter_names, inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the experts of each sample.

        Args:
            x: Input of the base layer.

        Returns:
            Output in the shape and type of the base layer's.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged and not self.disable_adapters:
            self.routing.check_merged_task(self._merged_task)
            return self.base_layer(x)
        name = next((name for name in self.active_adapters if name in self.mola_norm), None)
        if name is None or self.disable_adapters:
            return self.base_layer(x)
        norm = self.mola_norm[name]
        dtype = torch.promote_types(x.dtype, torch.float32)
        dim, doubtful = 0, None
        if norm.normalises_last and x.dim() > 2:  # as in a dense layer; others have the samples first
            dim = self.batch_dim
            doubtful = x.shape[1] if not self.knows_batch_dim else True if dim else None
        weights = self.routing.expert_weights(name, self.tower, x.shape[dim], dtype, doubtful)
        return norm(self.get_base_layer(), x, weights, dim)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put affine and statistics of the fixed task into the base layer.

        Args:
            safe_merge: Check that they are finite before they replace those of the base.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If an adapter has a router, no task is fixed, several adapters are merged, or a value is not
                finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mola_norm]
        self.check_merge(names, safe_merge)
        for name in names:
            task, base = self.routing.get_task_to_merge(name), self.get_base_layer()
            values = self._find_values(name, task)
            self._unmerged = {key: getattr(base, key).data.clone() for key in values}
            for key, value in values.items():
                getattr(base, key).data.copy_(value)
            self.merged_adapters.append(name)
            self._merged_task[name] = task

    def check_merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Raise a ValueError if adapters cannot be merged here, before anything is changed.

        Args:
            adapter_names: Adapters to merge; those that are merged or have no normalisation here do not matter.
            safe_merge: Check that the values are finite, too.
        """
        own = [name for name in adapter_names if name in self.mola_norm]
        self._check_one([*self.merged_adapters, *own], "merge")
        for name in own if safe_merge else ():
            values = self._find_values(name, self.routing.get_task_to_merge(name)).values()
            if not all(torch.isfinite(value).all() for value in values):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken; nothing was merged."
                )

    def _find_values(self, adapter_name: str, task: int) -> dict[str, torch.Tensor]:
        """Return what a task has in place of the parameters and buffers of the base layer, by their names."""
        own = self.mola_norm[adapter_name]
        names = {"weight": "scale", "bias": "shift"} | {name: name for name in (*STATISTICS, "num_batches_tracked")}
        values = {name: getattr(own, own_name, None) for name, own_name in names.items()}
        return {name: value[task].detach() for name, value in values.items() if value is not None}

    def unmerge(self) -> None:
        """Restore affine and statistics of the base layer."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for key, value in self._unmerged.items():
            getattr(self.get_base_layer(), key).data.copy_(value)
        self.merged_adapters.clear()
        self._merged_task.clear()
        self._unmerged = {}

    def _check_one(self, names: list[str], verb: str) -> None:
        if len(set(names)) > 1:
            raise ValueError(
                f"The adapters {', '.join(map(repr, names))} have task_norms, and a sample can be normalised by one "
                f"of them only: {verb} one at a time."
            )

    def __repr__(self) -> str:
        return "mola." + super().__repr__()


# ---- into a model ----


def check_task_norms(model: nn.Module, config: MolaConfig) -> None:
    """Raise a ValueError if an adapter asks for task norms where there is none to adapt.

    Args:
        model: Base model.
        config: Configuration of the adapter.
    """
    if config.task_norms and not any(True for _ in _find_norms(model, config)):
        raise ValueError(
            f"task_norms=True: {type(model).__name__} has no normalisation layer that MoLA can adapt (batch norm, "
            "layer norm, group norm, RMS norm), or exclude_modules excludes them all; use task_norms=False."
        )


def check_norms_to_merge(model: nn.Module, adapter_names: list[str], safe_merge: bool) -> None:
    """Raise a ValueError if the normalisation of adapters cannot be merged, before any layer is changed.

    Args:
        model: Base model with the adapters in it.
        adapter_names: Adapters to merge.
        safe_merge: Check that the values are finite, too.
    """
    for module in model.modules():
        if isinstance(module, MolaNorm):
            module.check_merge(adapter_names, safe_merge)


def add_task_norms(
    model: nn.Module,
    adapter_name: str,
    config: MolaConfig,
    routing: Routing,
    active_adapters: list[str],
) -> None:
    """Give the normalisation layers of the towers with adapted layers an affine and statistics for each expert.

    Args:
        model: Base model, which must hold the other layers of the adapter already.
        adapter_name: Name of the adapter.
        config: Configuration of the adapter.
        routing: Source of the experts' weights.
        active_adapters: Adapters that are active; an adapter that is not does not train.
    """
    if not config.task_norms:
        return
    adapted = {
        cast(Any, module).tower
        for module in model.modules()
        if isinstance(module, MolaTunerLayer) and adapter_name in getattr(module, "mola_A", ())
    }
    left_out: dict[str, str] = {}
    for name, parent, child_name in list(_find_norms(model, config, left_out)):
        tower = routing.find_tower(name)
        if tower in adapted:
            layer = getattr(parent, child_name)
            if not isinstance(layer, MolaNorm):
                layer = MolaNorm(layer, routing, tower)
                layer.batch_dim, layer.knows_batch_dim = find_batch_dim(model, name, config.sequence_first)
                setattr(parent, child_name, layer)
            layer.update_layer(adapter_name, config.num_experts)
            layer.set_adapter(active_adapters, inference_mode=config.inference_mode)
    if left_out:
        examples = ", ".join(f"{name} ({kind})" for kind, name in left_out.items())
        warnings.warn(
            f"task_norms: layers of these kinds stay the same for all tasks: {examples}. MoLA does not know how they "
            "normalise, or nothing calls them.",
            stacklevel=2,
        )


def _find_norms(
    model: nn.Module, config: MolaConfig, left_out: dict[str, str] | None = None
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, parent and name in the parent of each normalisation layer that an adapter may adapt."""
    own: Any = copy.copy(config)
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, parent = stack.pop()
        for child_name, child in parent.named_children():
            name = f"{path}.{child_name}" if path else child_name
            if isinstance(child, Routing) or (isinstance(parent, BaseTunerLayer) and child_name != "base_layer"):
                continue
            norm = child.base_layer if isinstance(child, MolaNorm) else child
            kind = find_kind(norm)
            own.target_modules = {child_name}  # so that exclude_modules and layers_to_transform count, and these only
            allowed = check_target_module_exists(own, name)
            allowed = bool(allowed) and not isinstance(allowed, _ExcludedModule)
            # A fast path of torch reads the weights of these without a call.
            called = not isinstance(parent, nn.TransformerEncoderLayer)
            if kind is not None and called and not isinstance(parent, BaseTunerLayer):
                if allowed and (kind == "batch" or getattr(norm, "weight", None) is not None):
                    yield name, parent, child_name
            elif left_out is not None and allowed and _seems_a_norm(norm):
                left_out.setdefault(type(norm).__name__, name)
            if kind is None and not isinstance(child, MolaNorm):
                stack.append((name, child))


def _seems_a_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
