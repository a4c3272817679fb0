"""The hooks on a base model, through which routing sees the input before the adapted layers do."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_dissect.mola.checkpointing import Carrier, get_checkpointing_mode
from hf_dissect.mola.forward_pass import ExpertChoice, ForwardPass
from hf_dissect.mola.router import Router
from hf_dissect.mola.routing import Routing
from hf_dissect.mola.towers import find_input_layer, find_towers, pool_output

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def attach_hooks(routing: Routing, model: nn.Module) -> None:
    """Register the hooks of a new routing on its base model; `Routing.detach` removes them.

    Args:
        routing: Routing to fill.
        model: Base model.
    """
    routing.handles += [
        model.register_forward_pre_hook(partial(_before_model, routing), with_kwargs=True),
        model.register_forward_hook(partial(_after_model, routing), always_call=True),
    ]
    for tower, module in find_towers(model).items():
        hook = partial(_before_tower, routing, tower)
        routing.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if module is not model:
            routing.handles.append(module.register_forward_hook(partial(_after_tower, routing)))


def hook_input_layers(routing: Routing, adapter_name: str, model: nn.Module) -> None:
    """Register a hook on the input layer of each tower that an adapter routes by its embeddings.

    Args:
        routing: Routing that holds the adapter.
        adapter_name: Name of the adapter.
        model: Base model.
    """
    if adapter_name not in routing.mola_router:
        return
    branches = cast(Router, routing.mola_router[adapter_name]).branches
    for tower, module in find_towers(model).items():
        if tower in branches and routing.get_router_source(adapter_name, tower) == "embeddings":
            _hook_input_layer(routing, tower, module)


def _hook_input_layer(routing: Routing, tower: str, module: nn.Module) -> None:
    layer = find_input_layer(module)
    hooks = (hook for part in layer.modules() for hook in part._forward_hooks.values())
    if not any(isinstance(hook, _InputLayerHook) and hook.routing is routing for hook in hooks):
        routing.handles.append(layer.register_forward_hook(_InputLayerHook(routing, tower)))


class _InputLayerHook:
    """A hook that routes by the output of an input layer.

    A copy of the whole model calls the copied routing; a copy of the layer alone still calls the original one.

    Args:
        routing: Routing to fill.
        tower: Tower of the layer.
    """

    def __init__(self, routing: Routing, tower: str) -> None:
        self.routing, self.tower = routing, tower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        mask = self.routing.forward_pass.masks.get(self.tower)
        return _route_pooled(self.routing, self.tower, output, pool_output(module, output, mask))

    def __deepcopy__(self, memo: dict[int, Any]) -> _InputLayerHook:
        return _InputLayerHook(memo.get(id(self.routing), self.routing), self.tower)


# ---- the hooks ----


def _before_model(routing: Routing, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    kwargs = _begin_pass(routing, module, args, kwargs)
    routing.forward_pass.inside_model = True
    return args, kwargs


def _after_model(routing: Routing, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    routing.forward_pass.inside_model = False
    _restore_in_backward(routing, output)


def _before_tower(
    routing: Routing, tower: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    if not routing.forward_pass.inside_model:  # get_image_features and the like call a tower by itself
        kwargs = _begin_pass(routing, module, args, kwargs)
    for adapter_name, router in routing.get_active_routers():
        if tower not in router.branches:
            continue
        if routing.get_router_source(adapter_name, tower) == "pixels":
            args, kwargs = _route_pixels(routing, adapter_name, tower, module, args, kwargs)
        else:
            _hook_input_layer(routing, tower, module)  # the active adapter may have a copy of its own
            mask = kwargs.get("attention_mask")
            routing.forward_pass.masks[tower] = mask
            if (embeds := kwargs.get("inputs_embeds")) is not None:
                embeds = _route_pooled(routing, tower, embeds, pool_output(find_input_layer(module), embeds, mask))
                kwargs = kwargs | {"inputs_embeds": embeds}
    return args, kwargs


def _after_tower(routing: Routing, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not routing.forward_pass.inside_model:
        _restore_in_backward(routing, output)


def _restore_in_backward(routing: Routing, output: Any) -> None:
    """Put this pass's choice in force again when its backward pass begins; other passes may come in between."""
    if routing.forward_pass.checkpointed:
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_restore_choice, routing, routing.choice))


def _restore_choice(routing: Routing, choice: ExpertChoice, gradient: torch.Tensor) -> None:
    routing.choice = choice


# ---- the steps of a pass ----


def _begin_pass(routing: Routing, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reset the routing, choose the experts by task, and score with routers that see all inputs.

    Returns:
        The keyword arguments without `task_ids`.
    """
    decodes = kwargs.get("encoder_outputs") is not None  # the encoder, called before, has seen the input
    before, before_pass = routing.choice, routing.forward_pass
    routing.choice = ExpertChoice(weights=before.weights if decodes else {})
    routing.forward_pass = ForwardPass(projections=before_pass.projections if decodes else {})
    kwargs = dict(kwargs)
    task_ids = kwargs.pop("task_ids", None)
    if routing.disable_adapters:
        return kwargs
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "MoLA does not work with torch.nn.DataParallel, whose threads would share one routing; run a process "
            "for each device (accelerate launch, torchrun), or show one device only (CUDA_VISIBLE_DEVICES)."
        )
    tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
    if tensors:
        routing.choice.device = tensors[0].device
    mode = get_checkpointing_mode(module) if routing.training and torch.is_grad_enabled() else None
    routing.forward_pass.checkpointed, routing.forward_pass.reentrant = mode is not None, mode == "reentrant"
    routing.set_tasks(task_ids, tensors)
    for adapter_name, router in routing.get_active_routers():
        if "all" in router.branches and not decodes:
            inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
            scores, projection = router("all", **inputs)
            for tower in routing.towers:
                _set_weights(routing, adapter_name, tower, scores, projection)
    return kwargs


def _route_pixels(
    routing: Routing,
    adapter_name: str,
    tower: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Arguments:
    names = list(inspect.signature(module.forward).parameters)
    position = names.index("pixel_values") if "pixel_values" in names else len(args)
    named = "pixel_values" in kwargs
    pixels = kwargs.get("pixel_values") if named or position >= len(args) else args[position]
    if pixels is None:
        raise ValueError(
            f"pixel_values is missing: the router of adapter {adapter_name!r} looks at pixels. Give the model "
            "pixel_values, or create the adapter with router_input='embeddings'."
        )
    scores, projection = routing.mola_router[adapter_name](tower, pixel_values=pixels)
    pixels = _set_weights(routing, adapter_name, tower, scores, projection, pixels)
    if named:
        return args, kwargs | {"pixel_values": pixels}
    return (*args[:position], pixels, *args[position + 1 :]), kwargs


def _route_pooled(routing: Routing, tower: str, embeddings: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    for adapter_name, router in routing.get_active_routers():
        if tower in router.branches and routing.get_router_source(adapter_name, tower) == "embeddings":
            scores, projection = router(tower, pooled=pooled)
            embeddings = cast(torch.Tensor, _set_weights(routing, adapter_name, tower, scores, projection, embeddings))
    return embeddings


def _set_weights(
    routing: Routing,
    adapter_name: str,
    tower: str,
    scores: torch.Tensor,
    projection: torch.Tensor | None,
    carrier: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Put the softmax of a router's scores in force.

    Args:
        routing: Routing to fill.
        adapter_name: Name of the adapter.
        tower: Tower that is routed.
        scores: Scores of the router, `(B, E)`.
        projection: Projected scores, `(B, decorrelation_dim)`.
        carrier: Input of the tower, through which gradients return from reentrant checkpoints.

    Returns:
        The carrier, to use in place of the one given.

    Raises:
        ValueError: If the checkpoints are reentrant and no carrier is given.
    """
    weights = (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1)
    if projection is not None:
        routing.forward_pass.projections[adapter_name, tower] = projection
        if projection.requires_grad:  # in evaluation as well, where some train
            # DDP searches for unused parameters from the model's outputs, so the projection must be reachable.
            weights = weights + 0.0 * projection.sum()
    if routing.forward_pass.reentrant and weights.requires_grad:
        if carrier is None:
            raise ValueError(
                f"The registered router of adapter {adapter_name!r} does not work with reentrant gradient "
                "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        leaf = weights.detach().requires_grad_()
        carrier, weights = Carrier.apply(carrier, weights, [leaf]), leaf
    routing.choice.weights[adapter_name, tower] = weights
    return carrier
