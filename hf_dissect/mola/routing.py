"""The routing of a model: the routers of its adapters, and the weights of the experts in the current forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.decorrelation import decorrelation_loss
from hf_dissect.mola.forward_pass import ExpertChoice, ForwardPass
from hf_dissect.mola.router import Router
from hf_dissect.mola.tasks import check_task_ids
from hf_dissect.mola.towers import choose_router_sources, find_towers


class MolaTunerLayer(BaseTunerLayer):
    """Base class of every module that MoLA puts into a model."""


class Routing(nn.Module, MolaTunerLayer):
    """The routers of a model, and the weights of the experts in its current forward pass.

    The base model holds it as the module `mola`, so that whatever moves, casts, saves or switches adapters finds it.
    Hooks on the base model (see `hooks.py`) fill `choice`, whoever calls that model. The choice stays in force
    after the forward pass, because gradient checkpointing runs the layers again in the backward pass.

    Args:
        model: Base model.

    Attributes:
        mola_router: `Router` of each adapter.
        mola_config: `MolaConfig` of each adapter.
        fixed_task: Task fixed by `MolaModel.set_task`, for each adapter that has one.
        towers: Names of the parts of the model with an input of their own, `["image", "text"]` or `["model"]`.
        choice: Experts in force.
        forward_pass: State of the hooks.
        handles: Handles of the hooks on the base model.
    """

    adapter_layer_names = ("mola_router",)
    other_param_names = ("mola_config", "fixed_task")
    in_features = out_features = None  # PEFT asks every tuner layer, but this one adapts no layer

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.mola_router = nn.ModuleDict()
        self.mola_config: dict[str, MolaConfig] = {}
        self.fixed_task: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.training = model.training
        self.towers = list(find_towers(model))
        self._base_device: torch.device | None = None
        self._base_dtype: torch.dtype | None = None
        self.choice = ExpertChoice()
        self.forward_pass = ForwardPass()
        self.handles: list[RemovableHandle] = []

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, config: MolaConfig, router: Router | None, model: nn.Module) -> None:
        """Add an adapter, with its router if it has one.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            router: Router of the adapter; its branches for towers without adapted layers are dropped.
            model: Base model, which must hold the layers of the adapter already.
        """
        self.mola_config[adapter_name] = config
        if router is not None:
            # In the model's mode, because batch norms must not learn in evaluation.
            self.mola_router[adapter_name] = router.train(self.training)
            adapted = self._find_adapted_towers(adapter_name, model)
            for tower in self.towers:
                if tower in router.branches and tower not in adapted:
                    router.branches.pop(tower)

    def align_buffers(self, adapter_name: str) -> None:
        """Cast a router's batch-norm statistics to the type of its weights; PEFT casts the weights only."""
        if adapter_name in self.mola_router:
            router = self.mola_router[adapter_name]
            dtype = next(router.parameters()).dtype
            for module in router.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        setattr(module, name, buffer.to(dtype))

    def detach(self) -> None:
        """Remove the hooks from the base model."""
        for handle in self.handles:
            handle.remove()

    def find_tower(self, module_name: str) -> str:
        """Return the tower that the named module of the base model belongs to."""
        if self.towers == ["model"]:
            return "model"
        return "text" if module_name.startswith("text") else "image"

    def get_active_routers(self) -> Iterator[tuple[str, Router]]:
        """Yield name and router of each active adapter that has a router."""
        names = (name for name, _ in self._get_active_configs() if name in self.mola_router)
        return ((name, cast(Router, self.mola_router[name])) for name in names)

    def get_router_source(self, adapter_name: str, tower: str) -> str:
        """Return the input of an adapter's router for a tower: `"pixels"`, `"embeddings"` or a registered name."""
        # A MolaModel has resolved router_input=None before the adapter arrives here.
        return choose_router_sources(cast(str, self.mola_config[adapter_name].router_input), self.towers)[tower]

    def _get_active_configs(self) -> list[tuple[str, MolaConfig]]:
        if self.disable_adapters:
            return []
        return [(name, self.mola_config[name]) for name in self.active_adapters if name in self.mola_config]

    @staticmethod
    def _find_adapted_towers(adapter_name: str, model: nn.Module) -> set[str]:
        layers: Iterator[Any] = (module for module in model.modules() if isinstance(module, MolaTunerLayer))
        return {layer.tower for layer in layers if hasattr(layer, "tower") and adapter_name in layer.mola_A}

    # ---- tasks of a pass ----

    def set_tasks(self, task_ids: torch.Tensor | None, tensors: list[torch.Tensor]) -> None:
        """Choose the experts of the grad adapters for the pass that begins.

        Args:
            task_ids: Tasks of the samples, int64 `(B,)`; None to use the fixed or default task.
            tensors: Other inputs of the model; the first has `B` rows.

        Raises:
            TypeError: If `task_ids` is not an int64 tensor.
            ValueError: If their shape, device or range is wrong, or they are missing in training.
        """
        grad_adapters = [(name, config) for name, config in self._get_active_configs() if config.variant == "grad"]
        if not grad_adapters:
            return
        if task_ids is None:
            missing = [name for name, _ in grad_adapters if self._get_default_task(name) is None]
            if missing and self.training:
                raise ValueError(
                    f"task_ids are missing: adapter {missing[0]!r} trains an expert per task. Call the model with "
                    "task_ids=..., int64 (B,). If you did, set the configuration's task_type to None, because PEFT "
                    "drops them otherwise. In evaluation the mean of the experts is used."
                )
            return
        choice = self.choice
        choice.common_task = check_task_ids(
            task_ids, tensors, {name: config.num_experts for name, config in grad_adapters}
        )
        choice.task_ids = task_ids
        if choice.common_task is None:
            # Once for all layers of the pass.
            choice.one_hot = {name: F.one_hot(task_ids, config.num_experts) for name, config in grad_adapters}

    def get_task_to_merge(self, adapter_name: str) -> int:
        """Return the task whose expert a merge adds to the base weights.

        Raises:
            ValueError: If the adapter has a router, or no task is fixed.
        """
        config = self.mola_config[adapter_name]
        if config.variant == "router":
            raise ValueError(
                f"Adapter {adapter_name!r} has a router: its weights depend on the input and cannot be merged."
            )
        task = self._get_default_task(adapter_name)
        if task is None:
            raise ValueError(
                f"Adapter {adapter_name!r} has an expert per task: choose the one to merge with `set_task(task)`, a "
                f"task from 0 to {config.num_experts - 1}."
            )
        return task

    def check_merged_task(self, merged: Mapping[str, int]) -> None:
        """Raise a ValueError if the pass has task ids other than the merged task.

        Args:
            merged: Merged task of each adapter.
        """
        if self.choice.task_ids is not None and {self.choice.common_task} != set(merged.values()):
            raise ValueError(
                f"task_ids were given while the expert of task {sorted(merged.values())[0]} is merged; call "
                "`unmerge_adapter()` first."
            )

    def _get_default_task(self, adapter_name: str) -> int | None:
        return self.fixed_task.get(adapter_name, self.mola_config[adapter_name].default_task)

    # ---- weights for the layers ----

    def expert_weights(
        self, adapter_name: str, tower: str, batch_size: int, dtype: torch.dtype, repeat: bool = True
    ) -> torch.Tensor | int:
        """Return the weights of an adapter's experts in the current pass.

        Args:
            adapter_name: Name of the adapter.
            tower: Tower of the layer that asks.
            batch_size: Number of rows of the layer's input, a multiple of the number of samples.
            dtype: Type of the experts.
            repeat: True for an entry per row, False for an entry per sample, which serves as many rows in succession
                as a sample has.

        Returns:
            Weights `(batch_size, E)` or `(1, E)`, in double precision if `dtype` is, otherwise in single precision;
            the expert of each row, int64 `(batch_size,)`; or the index of the one expert that serves the whole batch.

        Raises:
            ValueError: If the weights were made for another batch.
            RuntimeError: If there are no weights, because a part of the model was called by itself.
        """
        config = self.mola_config[adapter_name]
        if config.variant == "grad":
            weights = self._task_weights(adapter_name, torch.promote_types(dtype, torch.float32))
        elif (adapter_name, tower) in self.choice.weights:
            weights = self.choice.weights[adapter_name, tower]
        else:
            raise RuntimeError(
                f"The router of adapter {adapter_name!r} has not seen the input: call the whole model (or a whole "
                "tower of it), not a part."
            )
        if isinstance(weights, int) or len(weights) in (1, batch_size):
            return weights
        if batch_size % len(weights):
            raise ValueError(
                f"A layer got a batch of {batch_size}, but {'task_ids' if config.variant == 'grad' else 'the router'} "
                f"had {len(weights)} samples."
            )
        # Windows or tokens of each sample.
        return weights.repeat_interleave(batch_size // len(weights), dim=0) if repeat else weights

    def _task_weights(self, adapter_name: str, dtype: torch.dtype) -> torch.Tensor | int:
        choice, num_experts = self.choice, self.mola_config[adapter_name].num_experts
        if choice.common_task is not None:
            return choice.common_task
        if choice.task_ids is not None:
            return choice.task_ids
        task = self._get_default_task(adapter_name)
        if task is not None:
            return task
        return torch.full((1, num_experts), 1 / num_experts, device=choice.device, dtype=dtype)

    # ---- training ----

    @property
    def needs_task_ids(self) -> bool:
        """True if an active adapter has an expert per task."""
        return any(config.variant == "grad" for _, config in self._get_active_configs())

    @property
    def decorrelates(self) -> bool:
        """True if an active adapter has a router with a decorrelation loss."""
        configs = self._get_active_configs()
        return any(config.variant == "router" and config.decorrelation_weight for _, config in configs)

    def projections(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the projected scores `(B, decorrelation_dim)` of the last forward pass, by adapter and tower."""
        return dict(self.forward_pass.projections)

    def decorrelation_loss(
        self, task_ids: torch.Tensor, projections: Mapping[tuple[str, str], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Compute the weighted task-wise decorrelation loss: the mean over the towers, summed over the adapters.

        Args:
            task_ids: Tasks of the samples, integers `(B,)`.
            projections: Projected scores in the form of `projections()`, for a batch that went through the model in
                parts; None for those of the last forward pass.

        Returns:
            A scalar with gradient.

        Raises:
            RuntimeError: If no forward pass with a router was made.
        """
        projections = self.forward_pass.projections if projections is None else projections
        if not projections:
            raise RuntimeError("decorrelation_loss needs a forward pass of a model with a MoLA router before.")
        losses = []
        for (adapter_name, _), projection in projections.items():
            config = self.mola_config[adapter_name]
            loss = decorrelation_loss(projection, task_ids, config.decorrelation_temperature)
            losses.append(config.decorrelation_weight * loss)
        num_adapters = len({adapter_name for adapter_name, _ in projections})
        return torch.stack(losses).mean() * num_adapters

    def last_weights(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """Return the router's weights `(B, E)` in the last forward pass for each tower, without gradient.

        Args:
            adapter_name: Name of the adapter; None for the first active one.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        weights = self.choice.weights
        return {tower: values.detach() for (name, tower), values in weights.items() if name == names[0]}

    # ---- protocol of PEFT and pickle ----

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a gradient graph, which a forward pass leaves behind, can be neither copied nor pickled.
        choice = replace(self.choice, weights={}, task_ids=None, one_hot={})
        return self.__dict__ | {
            "choice": choice,
            "forward_pass": replace(self.forward_pass, projections={}, masks={}),
        }

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._base_device = device or self._base_device
        self._base_dtype = dtype or self._base_dtype
        if adapter_name in self.mola_router and self._base_device is not None:
            router = self.mola_router[adapter_name]
            if not any(parameter.is_meta for parameter in router.parameters()):
                router.to(self._base_device, self._base_dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Not available: routing adapts no weight."""
        raise AttributeError("routing adapts no weight")

    @property
    def bias(self) -> torch.Tensor:
        """Not available: routing adapts no bias."""
        raise AttributeError("routing adapts no bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the layers are merged one by one.

        Args:
            safe_merge: Ignored.
            adapter_names: Ignored.
        """

    def unmerge(self) -> None:
        """Do nothing: the layers are unmerged one by one."""


def mola_routing(model: nn.Module) -> Routing | None:
    """Return the routing of a model, wrapped (PEFT, DDP, ...) or not; None if it has no MoLA adapter."""
    return next((module for module in model.modules() if isinstance(module, Routing)), None)
