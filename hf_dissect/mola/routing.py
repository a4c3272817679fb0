"""Which experts are in force: set when a forward pass begins, read by the adapted layers until the next begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_dissect.mola.checkpointing import Carrier, checkpointing_mode
from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.decorrelation import decorrelation_loss
from hf_dissect.mola.router import Router
from hf_dissect.mola.tasks import check_task_ids
from hf_dissect.mola.towers import input_layer, pool, router_sources, towers_of


class MolaTunerLayer(BaseTunerLayer):
    """Base of everything that MoLA puts into a model."""


class Routing(nn.Module, MolaTunerLayer):
    """The routers of a model, and the weights of the experts in its current forward pass.

    It lies in the base model as the module `mola`, so that whatever moves, casts, saves or switches adapters finds it,
    and works by hooks on the base model, so that it does not matter who calls that. The weights stay in force after a
    forward pass: gradient checkpointing runs the layers again in the backward pass.

    Attributes:
        mola_router: adapter -> `Router`.
        mola_config: adapter -> `MolaConfig`.
        towers: the parts of the model with an input of their own: `["image", "text"]` or `["model"]`.
    """

    adapter_layer_names = ("mola_router",)
    other_param_names = ("mola_config", "fixed_task")
    in_features = out_features = None  # asked of every tuner layer, but this one stands for no layer of the model

    def __init__(self, model: nn.Module):
        super().__init__()
        self.mola_router = nn.ModuleDict()
        self.mola_config: dict[str, MolaConfig] = {}
        self.fixed_task: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.training = model.training
        self.towers = list(towers_of(model))
        self._base_device: torch.device | None = None
        self._base_dtype: torch.dtype | None = None
        self._forget()
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        for tower, module in towers_of(model).items():
            self._handles.append(
                module.register_forward_pre_hook(partial(self._before_tower, tower), with_kwargs=True)
            )
            if module is not model:
                self._handles.append(module.register_forward_hook(self._after_tower))

    def add_adapter(self, adapter_name: str, config: MolaConfig, router: Router | None, model: nn.Module) -> None:
        """Take an adapter in, with its router if it has one; the base model must hold its layers already."""
        self.mola_config[adapter_name] = config
        if router is not None:
            # In the model's mode: batch norms must not learn in evaluation.
            self.mola_router[adapter_name] = router.train(self.training)
            adapted = self._adapted_towers(adapter_name, model)
            for tower, module in towers_of(model).items():
                if tower in router.branches and tower not in adapted:
                    router.branches.pop(tower)  # nothing to route there
                elif tower in router.branches and self._source(adapter_name, tower) == "embeddings":
                    self._hook_input_layer(tower, module)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._base_device = device or self._base_device
        self._base_dtype = dtype or self._base_dtype
        if adapter_name in self.mola_router and self._base_device is not None:
            router = self.mola_router[adapter_name]
            if not any(parameter.is_meta for parameter in router.parameters()):
                router.to(self._base_device, self._base_dtype)

    def align_buffers(self, adapter_name: str) -> None:
        """Give a router's batch-norm statistics the type of its weights: PEFT casts weights only."""
        if adapter_name in self.mola_router:
            router = self.mola_router[adapter_name]
            dtype = next(router.parameters()).dtype
            for module in router.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        setattr(module, name, buffer.to(dtype))

    def detach(self) -> None:
        """Take the hooks off the base model."""
        for handle in self._handles:
            handle.remove()

    def tower_of(self, module_name: str) -> str:
        """The tower that a module of the base model belongs to."""
        if self.towers == ["model"]:
            return "model"
        return "text" if module_name.startswith("text") else "image"

    # ---- what the layers ask ----

    def expert_weights(self, adapter_name: str, tower: str, batch_size: int, dtype: torch.dtype) -> torch.Tensor | int:
        """Weights `(batch_size or 1, E)` of an adapter's experts, or the one expert that serves the whole batch.

        They come in single precision, or in double precision where that is the `dtype` of the experts.

        Raises:
            ValueError: the batch is not the one the weights were made for.
            RuntimeError: there are none, as a part of the model was called by itself.
        """
        config = self.mola_config[adapter_name]
        if config.variant == "grad":
            weights = self._task_weights(adapter_name, torch.promote_types(dtype, torch.float32))
        elif (adapter_name, tower) in self._weights:
            weights = self._weights[adapter_name, tower]
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
        return weights.repeat_interleave(batch_size // len(weights), dim=0)  # windows or tokens of each sample

    def _task_weights(self, adapter_name: str, dtype: torch.dtype) -> torch.Tensor | int:
        num_experts = self.mola_config[adapter_name].num_experts
        if self._single_task is not None:
            return self._single_task
        if self._task_ids is not None:
            return self._one_hot[adapter_name].to(dtype)
        task = self._default_task(adapter_name)
        if task is not None:
            return task
        return torch.full((1, num_experts), 1 / num_experts, device=self._device, dtype=dtype)

    def _default_task(self, adapter_name: str) -> int | None:
        return self.fixed_task.get(adapter_name, self.mola_config[adapter_name].default_task)

    def task_to_merge(self, adapter_name: str) -> int:
        """The task whose expert a merge adds to the base weights.

        Raises:
            ValueError: the adapter has a router, or no task is fixed.
        """
        config = self.mola_config[adapter_name]
        if config.variant == "router":
            raise ValueError(
                f"Adapter {adapter_name!r} has a router: its weights depend on the input and cannot be merged."
            )
        task = self._default_task(adapter_name)
        if task is None:
            raise ValueError(
                f"Adapter {adapter_name!r} has an expert per task: choose the one to merge by `set_task(task)`, a "
                f"task from 0 to {config.num_experts - 1}."
            )
        return task

    def check_merged_task(self, merged: Mapping[str, int]) -> None:
        """Raise ValueError when the pass has task ids other than the task that is merged."""
        if self._task_ids is not None and {self._single_task} != set(merged.values()):
            raise ValueError(
                f"task_ids were given while the expert of task {sorted(merged.values())[0]} is merged; call "
                "`unmerge_adapter()` first."
            )

    # ---- what a trainer asks ----

    @property
    def needs_task_ids(self) -> bool:
        """Whether an active adapter has an expert per task."""
        return any(config.variant == "grad" for _, config in self._active_configs())

    @property
    def decorrelates(self) -> bool:
        """Whether an active adapter has a router with a decorrelation loss."""
        return any(config.variant == "router" and config.decorrelation_weight for _, config in self._active_configs())

    def projections(self) -> dict[tuple[str, str], torch.Tensor]:
        """What `decorrelation_loss` is made of, of the last forward pass: `(adapter, tower) -> (B, d)`."""
        return dict(self._projections)

    def decorrelation_loss(
        self, task_ids: torch.Tensor, projections: Mapping[tuple[str, str], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The task-wise decorrelation loss, times its weight; mean over the towers.

        Args:
            task_ids: integers `(B,)`.
            projections: as of `projections()`, for a batch that went through the model in parts; by default those of
                the last forward pass.

        Raises:
            RuntimeError: no forward pass with a router has been made.
        """
        projections = self._projections if projections is None else projections
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
        """The routing weights of the last forward pass, `tower -> (B, E)`, without gradient, for plots."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        return {tower: weights.detach() for (name, tower), weights in self._weights.items() if name == names[0]}

    # ---- the forward pass ----

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = self._begin(module, args, kwargs)
        self._inside = True
        return args, kwargs

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._inside = False
        self._keep_for_backward(output)

    def _after_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._inside:
            self._keep_for_backward(output)

    def _keep_for_backward(self, output: Any) -> None:
        """Have this pass's weights in force again when its backward pass begins, if other passes came in between."""
        if self._checkpoints:
            state = {
                name: getattr(self, name) for name in ("_weights", "_task_ids", "_single_task", "_one_hot", "_device")
            }
            for tensor in tree_leaves(output):
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._put_in_force, state))

    def _put_in_force(self, state: dict[str, Any], gradient: torch.Tensor) -> None:
        self.__dict__.update(state)

    def _before_tower(self, tower: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not self._inside:  # get_image_features and the like call a tower by itself
            kwargs = self._begin(module, args, kwargs)
        for adapter_name, router in self._active_routers():
            if tower not in router.branches:
                continue
            if self._source(adapter_name, tower) == "pixels":
                args, kwargs = self._route_argument("pixel_values", adapter_name, tower, module, args, kwargs)
            else:
                self._hook_input_layer(tower, module)  # another one where the active adapter has a copy of its own
                self._masks[tower] = kwargs.get("attention_mask")
                if (embeds := kwargs.get("inputs_embeds")) is not None:
                    embeds = self._route_pooled(tower, embeds, pool(input_layer(module), embeds, self._masks[tower]))
                    kwargs = kwargs | {"inputs_embeds": embeds}
        return args, kwargs

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> dict:
        decodes = kwargs.get("encoder_outputs") is not None  # the encoder, called before, has seen the input
        seen = (self._weights, self._projections) if decodes else ({}, {})
        self._forget()
        self._weights, self._projections = seen
        kwargs = dict(kwargs)
        task_ids = kwargs.pop("task_ids", None)
        if self.disable_adapters:
            return kwargs
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MoLA does not work with torch.nn.DataParallel, whose threads would share one routing; run a process "
                "for each device (accelerate launch, torchrun), or show one device only (CUDA_VISIBLE_DEVICES)."
            )
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        if tensors:
            self._device = tensors[0].device
        mode = checkpointing_mode(module) if self.training and torch.is_grad_enabled() else None
        self._checkpoints, self._reentrant = mode is not None, mode == "reentrant"
        self._take_tasks(task_ids, tensors)
        for adapter_name, router in self._active_routers():
            if "all" in router.branches and not decodes:
                scores = router("all", **_named_arguments(module, args, kwargs))
                for tower in self.towers:
                    self._set_weights(adapter_name, tower, *scores, None)
        return kwargs

    def _take_tasks(self, task_ids: torch.Tensor | None, tensors: list[torch.Tensor]) -> None:
        grad_adapters = [(name, config) for name, config in self._active_configs() if config.variant == "grad"]
        if not grad_adapters:
            return
        if task_ids is None:
            missing = [name for name, _ in grad_adapters if self._default_task(name) is None]
            if missing and self.training:
                raise ValueError(
                    f"task_ids are missing: adapter {missing[0]!r} trains an expert per task. Call the model with "
                    "task_ids=..., int64 (B,); if they were given, leave the configuration's task_type None (PEFT "
                    "drops them otherwise). In evaluation the mean of the experts is used."
                )
            return
        self._single_task = check_task_ids(
            task_ids, tensors, {name: config.num_experts for name, config in grad_adapters}
        )
        self._task_ids = task_ids
        if self._single_task is None:
            # Once for all layers of the pass.
            self._one_hot = {name: F.one_hot(task_ids, config.num_experts) for name, config in grad_adapters}

    def _route_argument(self, name, adapter_name, tower, module, args, kwargs) -> tuple[tuple, dict]:
        names = list(inspect.signature(module.forward).parameters)
        position = names.index(name) if name in names else len(args)
        value = kwargs.get(name) if name in kwargs or position >= len(args) else args[position]
        if value is None:
            raise ValueError(
                f"{name} is missing: the router of adapter {adapter_name!r} looks at pixels. Give the model "
                f"{name}, or make the adapter with router_input='embeddings'."
            )
        scores = self.mola_router[adapter_name](tower, **{name: value})
        value = self._set_weights(adapter_name, tower, *scores, value)
        if name in kwargs:
            return args, kwargs | {name: value}
        return (*args[:position], value, *args[position + 1 :]), kwargs

    def _after_input_layer(self, tower: str, layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return self._route_pooled(tower, output, pool(layer, output, self._masks.get(tower)))

    def _route_pooled(self, tower: str, embeddings: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        for adapter_name, router in self._active_routers():
            if tower in router.branches and self._source(adapter_name, tower) == "embeddings":
                embeddings = self._set_weights(adapter_name, tower, *router(tower, pooled=pooled), embeddings)
        return embeddings

    def _set_weights(self, adapter_name, tower, scores, projection, carrier) -> torch.Tensor | None:
        """Put weights in force; returns `carrier`, through which gradients come back from reentrant checkpoints."""
        weights = (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1)
        if projection is not None:
            self._projections[adapter_name, tower] = projection
            if projection.requires_grad:  # in evaluation as well, where some train
                # DDP looks for unused parameters from the model's outputs, where the projection must be found.
                weights = weights + 0.0 * projection.sum()
        if self._reentrant and weights.requires_grad:
            if carrier is None:
                raise ValueError(
                    f"The registered router of adapter {adapter_name!r} does not work with reentrant gradient "
                    "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            leaf = weights.detach().requires_grad_()
            carrier, weights = Carrier.apply(carrier, weights, [leaf]), leaf
        self._weights[adapter_name, tower] = weights
        return carrier

    # ---- small matters ----

    def _forget(self) -> None:
        self._weights: dict[tuple[str, str], torch.Tensor] = {}
        self._projections: dict[tuple[str, str], torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor | None] = {}
        self._task_ids: torch.Tensor | None = None
        self._single_task: int | None = None
        self._one_hot: dict[str, torch.Tensor] = {}
        self._device: torch.device | None = None
        self._inside = self._reentrant = self._checkpoints = False

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a gradient graph, as a forward pass leaves them, can be neither copied nor pickled.
        return self.__dict__ | {"_weights": {}, "_projections": {}, "_masks": {}, "_task_ids": None, "_one_hot": {}}

    def _active_configs(self) -> list[tuple[str, MolaConfig]]:
        if self.disable_adapters:
            return []
        return [(name, self.mola_config[name]) for name in self.active_adapters if name in self.mola_config]

    def _active_routers(self) -> Iterator[tuple[str, Router]]:
        return ((name, self.mola_router[name]) for name, _ in self._active_configs() if name in self.mola_router)

    def _source(self, adapter_name: str, tower: str) -> str:
        return router_sources(self.mola_config[adapter_name].router_input, self.towers)[tower]

    @staticmethod
    def _adapted_towers(adapter_name: str, model: nn.Module) -> set[str]:
        layers = (module for module in model.modules() if isinstance(module, MolaTunerLayer))
        return {layer.tower for layer in layers if hasattr(layer, "tower") and adapter_name in layer.mola_A}

    def _hook_input_layer(self, tower: str, module: nn.Module) -> None:
        layer = input_layer(module)
        hooks = (hook for part in layer.modules() for hook in part._forward_hooks.values())
        if not any(isinstance(hook, _InputLayerHook) and hook.routing is self for hook in hooks):
            self._handles.append(layer.register_forward_hook(_InputLayerHook(self, tower)))

    @property
    def weight(self) -> torch.Tensor:
        raise AttributeError("routing adapts no weight")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError("routing adapts no bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the layers are merged."""

    def unmerge(self) -> None:
        """Nothing: the layers are unmerged."""


class _InputLayerHook:
    """Calls the routing; a copy of the whole model calls the copied routing, a copy of the layer alone the same."""

    def __init__(self, routing: Routing, tower: str):
        self.routing, self.tower = routing, tower

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self.routing._after_input_layer(self.tower, module, output)

    def __deepcopy__(self, memo: dict) -> _InputLayerHook:
        return _InputLayerHook(memo.get(id(self.routing), self.routing), self.tower)


def _named_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def mola_routing(model: nn.Module) -> Routing | None:
    """The routing of a model in whatever it is wrapped (PEFT, DDP, ...); None if it has no MoLA adapter."""
    return next((module for module in model.modules() if isinstance(module, Routing)), None)
