"""The routing of a model: the routers of its adapters, and the weights of the experts for its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_dissect.mola.base_model import choose_router_sources, find_towers
from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.decorrelation import decorrelation_loss
from hf_dissect.mola.passes import Passes
from hf_dissect.mola.router import Router
from hf_dissect.mola.tasks import TaskChoice

NAMES = ("mola", "_mola")  # of the routing in a base model; PEFT passes over names with the prefix of its type


class MolaTunerLayer(BaseTunerLayer):
    """Base class of every module that MoLA puts into a model."""


class Routing(nn.Module, TaskChoice, MolaTunerLayer):
    """The routers of a model, and the experts in force in each of its calls.

    The base model holds it as the module `mola`, so that whatever moves, casts, saves or switches adapters
    finds it, also where a model loads its adapter without a `PeftModel`. Hooks on the base model (see `hooks.py`) fill
    `passes`, whoever calls that model.

    Args:
        model: Base model.

    Attributes:
        mola_router: `Router` of each adapter.
        mola_config: `MolaConfig` of each adapter.
        fixed_task: Task fixed by `MolaModel.set_task`, for each adapter that has one.
        towers: Names of the parts of the model with an input of their own, `["image", "text"]` or `["model"]`.
        passes: The calls of the model that run.
        entries: Hooks of each tower.
        handles: Handles of the hooks on the base model.
        wrapped: Methods of the base model that are wrapped, with what the instance had in their place.
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
        self.passes = Passes()
        self.entries: dict[str, Any] = {}
        self.handles: list[RemovableHandle] = []
        self.wrapped: dict[str, Any] = {}
        self._warned: set[str] = set()

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
            layers: Iterator[Any] = (module for module in model.modules() if isinstance(module, MolaTunerLayer))
            adapted = {layer.tower for layer in layers if adapter_name in getattr(layer, "mola_A", ())}
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

    # ---- weights for the layers ----

    def expert_weights(
        self,
        adapter_name: str,
        tower: str,
        rows: int,
        dtype: torch.dtype,
        doubtful: int | bool | None = None,
        repeat: bool = True,
    ) -> torch.Tensor | int:
        """Return the weights of an adapter's experts in the current pass.

        Args:
            adapter_name: Name of the adapter.
            tower: Tower of the layer that asks.
            rows: Number of rows of the layer's input, a multiple of the number of samples.
            dtype: Type of the experts.
            doubtful: Size of the other dimension of an input that may be `(L, B, D)`; True if the samples are not in
                order where there are several rows of each.
            repeat: True for an entry per row, False for an entry per sample, which serves as many rows in succession
                as a sample has.

        Returns:
            Weights `(rows, E)` or `(1, E)`, in double precision if `dtype` is, otherwise in single precision; experts
            of the rows, int64 `(rows,)`; or the one expert that serves the whole batch.

        Raises:
            ValueError: If the weights were made for another batch, or the rows may not be those of samples.
            RuntimeError: If there are no weights, because a part of the model was called by itself.
        """
        weights = self._find_weights(adapter_name, tower, torch.promote_types(dtype, torch.float32))
        if isinstance(weights, int) or len(weights) == rows:
            return weights
        if len(weights) == 1:  # weights of all rows, or the task of the only sample
            return weights if weights.is_floating_point() or not repeat else weights.expand(rows)
        if rows % len(weights):
            by_task = self.mola_config[adapter_name].variant == "grad"
            raise ValueError(
                f"A layer got a batch of {rows}, but {'task_ids' if by_task else 'the router'} had {len(weights)} "
                "samples."
            )
        if doubtful is True or doubtful == len(weights):
            raise ValueError(
                f"A layer got {rows} rows in a batch of {len(weights)} samples, and they may not be in the order of "
                "the samples: its input may be (L, B, D). Name the modules that compute on (L, B, D) in the "
                "configuration's sequence_first, or set it to [] if there are none."
            )
        # Windows or tokens of each sample.
        return weights.repeat_interleave(rows // len(weights), dim=0) if repeat else weights

    def _find_weights(self, adapter_name: str, tower: str, dtype: torch.dtype) -> torch.Tensor | int:
        now, config = self.passes.current, self.mola_config[adapter_name]
        if config.variant == "router":
            if now is None or (adapter_name, tower) not in now.weights:
                raise RuntimeError(
                    f"The router of adapter {adapter_name!r} has not seen the input: call the whole model (or a whole "
                    "tower of it), not a part."
                )
            return now.weights[adapter_name, tower]
        if now is None:
            self._check_default_tasks([adapter_name])
        elif now.common_task is not None:
            return now.common_task
        elif now.task_ids is not None:
            return now.task_ids
        task = self.get_default_task(adapter_name)
        if task is not None:
            return task
        device = None if now is None else now.device
        return torch.full((1, config.num_experts), 1 / config.num_experts, device=device, dtype=dtype)

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
        last = self.passes.thread.last
        return {} if last is None else dict(last.projections)

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
        projections = self.projections() if projections is None else projections
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
        last = self.passes.thread.last
        weights = {} if last is None else last.weights
        return {tower: values.detach() for (name, tower), values in weights.items() if name == names[0]}

    # ---- protocol of PEFT ----

    def place_in(self, model: nn.Module) -> None:
        """Become a module of the base model if there are routers, otherwise an attribute of it.

        PEFT converts every tuner layer of a model to LoRA or none; without routers, that is possible.

        Args:
            model: Base model.
        """
        name = next((name for name in NAMES if getattr(model, name, None) is self), None) or choose_name(model)
        if self.mola_router:
            setattr(model, name, self)
        else:
            object.__setattr__(model, name, self)

    def follow(self, layer: MolaTunerLayer, layers: Iterable[MolaTunerLayer]) -> None:
        """Take over the state of the layers; without routers, PEFT and `train()` do not visit the routing itself.

        Args:
            layer: Layer whose state has changed.
            layers: All layers.
        """
        if not self.mola_router:
            self._active_adapter = layer.active_adapter
            self._disable_adapters = layer.disable_adapters and all(other.disable_adapters for other in layers)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False, with a warning that says why: a model with routers cannot be converted.

        Args:
            adapter_name: Ignored.
        """
        warnings.warn(
            "The model has a MoLA adapter with a router, whose weights depend on the input; a LoRA adapter cannot "
            "express it. To convert another adapter of the model, load that one alone.",
            stacklevel=2,
        )
        return False

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


def choose_name(model: nn.Module) -> str:
    """Return the name of the routing in a base model that has none yet.

    Args:
        model: Base model.

    Raises:
        ValueError: If the model has attributes of its own under all names.
    """
    for name in NAMES:
        if not hasattr(model, name):
            return name
    raise ValueError(f"{type(model).__name__} has attributes {' and '.join(NAMES)}, MoLA's own names; rename one.")


def get_own_routing(model: nn.Module) -> Routing | None:
    """Return the routing that a base model holds itself; None if it holds none."""
    held = (model._modules.get(name) or vars(model).get(name) for name in NAMES)  # see `Routing.place_in`
    return next((module for module in held if isinstance(module, Routing)), None)


def mola_routing(model: nn.Module) -> Routing | None:
    """Return the routing of a model, wrapped (PEFT, DDP, ...) or not; None if it has no MoLA adapter."""
    return next((routing for module in model.modules() if (routing := get_own_routing(module)) is not None), None)
