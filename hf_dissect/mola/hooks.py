"""The hooks on a base model, through which routing sees each call, and its input before the adapted layers do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any, cast

import torch
from torch import nn
from transformers import GradientCheckpointingLayer

from hf_dissect.mola.base_model import (
    find_input_layer,
    find_prompt,
    find_towers,
    is_causal_lm,
    is_sequence_first,
    pool_output,
    read_mask,
)
from hf_dissect.mola.passes import Pass
from hf_dissect.mola.router import Router
from hf_dissect.mola.routing import Routing

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Entry:
    """The hooks of one module by which callers enter a model: the whole of it, or a tower.

    Args:
        routing: Routing to fill.
        module: Module with the hooks.
        tower: Name of the tower; None for the whole model.
        base: Base model.
    """

    def __init__(self, routing: Routing, module: nn.Module, tower: str | None, base: nn.Module) -> None:
        self.routing, self.tower = routing, tower
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters
        self.names = [name for name, parameter in parameters.items() if parameter.kind in kinds]
        self.takes_task_ids = "task_ids" in self.names
        self.is_causal_lm = is_causal_lm(base)
        self.reuses_encoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        self.checkpoints = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
        self.input_layer: nn.Module | None = None
        self.sequence_first = False
        self._hooked_for: list[str] | None = None

    def hook_input_layer(self, module: nn.Module) -> None:
        """Register a hook on the input layer of this tower, if an adapter routes by its embeddings.

        It is checked again when other adapters become active, because an adapter may have saved a layer of its own.

        Args:
            module: Tower.
        """
        routing, tower = self.routing, cast(str, self.tower)
        active = [name for name in routing.active_adapters if name in routing.mola_router]
        if self._hooked_for == active:
            return
        self._hooked_for = active
        if not any(self._reads_embeddings(name, cast(Router, routing.mola_router[name])) for name in active):
            return
        layer = self.input_layer = find_input_layer(module)
        name = next((name for name, part in module.named_modules() if part is layer), "")
        self.sequence_first = is_sequence_first(module, name)
        hooks = (hook for part in layer.modules() for hook in part._forward_hooks.values())
        if not any(isinstance(hook, InputLayerHook) and hook.entry is self for hook in hooks):
            routing.handles.append(layer.register_forward_hook(InputLayerHook(self)))

    def _reads_embeddings(self, adapter_name: str, router: Router) -> bool:
        tower = cast(str, self.tower)
        return tower in router.branches and self.routing.get_router_source(adapter_name, tower) == "embeddings"

    # ---- before ----

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Begin a pass if none runs, and let the routers of this tower see what they read of its arguments."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        passes = self.routing.passes
        if self.tower is None or passes.current is None:
            passes.begin(self._make_pass(module, given))
            if not self.takes_task_ids:
                kwargs = {name: value for name, value in kwargs.items() if name != "task_ids"}
            if not self.routing.disable_adapters:
                self._route_all(given)
        if self.tower is not None and not self.routing.disable_adapters:
            self.hook_input_layer(module)
            args, kwargs = self._route(given, args, kwargs)
        return args, kwargs

    def _make_pass(self, module: nn.Module, given: Mapping[str, Any]) -> Pass:
        routing = self.routing
        if routing.disable_adapters:
            return Pass(module)
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MoLA does not work with torch.nn.DataParallel, whose copies would share one router; run a process "
                "for each device (accelerate launch, torchrun), or show one device only (CUDA_VISIBLE_DEVICES)."
            )
        thread = routing.passes.thread
        tensors = [value for name, value in given.items() if torch.is_tensor(value) and name != "task_ids"]
        first = tensors[0] if tensors else None
        size = len(first) if first is not None and first.dim() else None
        new = Pass(module, size=size, device=None if first is None else first.device, reentrant=self._is_reentrant())
        if (earlier := self._find_earlier(given)) is not None:
            new.weights, new.projections, new.held = earlier.weights, earlier.projections, True
        task_ids = None if self.takes_task_ids and self.tower is None else given.get("task_ids")
        if task_ids is None:
            task_ids = thread.task_ids
        if task_ids is None and thread.generation is not None:
            task_ids = thread.generation.task_ids
            if task_ids is not None and size is not None and size > len(task_ids) and size % len(task_ids) == 0:
                task_ids = task_ids.repeat_interleave(size // len(task_ids))  # beams of each sample
        routing.choose_tasks(new, task_ids)
        return new

    def _find_earlier(self, given: Mapping[str, Any]) -> Pass | None:
        """Return the pass that this call continues: that of the encoder, or of the prompt in the cache."""
        passes = self.routing.passes
        if self.reuses_encoder and self.tower is None:
            outputs = given.get("encoder_outputs")
            return None if outputs is None else passes.find(outputs[0])
        if not self.is_causal_lm:
            return None
        if passes.thread.generation is not None and passes.thread.generation.weights:
            return passes.thread.generation
        cache = given.get("past_key_values")
        if cache is None or not _count_cached(cache):
            return None
        earlier = passes.find(cache)
        if earlier is None and any(True for _ in self.routing.get_active_routers()):
            raise RuntimeError(
                "The prompt in past_key_values was not routed by this adapter: its tokens went through the model "
                "without it, or in another model. Let the model read the prompt with the adapter switched on first."
            )
        return earlier

    def _is_reentrant(self) -> bool:
        if not torch.is_grad_enabled() or not self.routing.training:
            return False
        for part in self.checkpoints:
            if part.gradient_checkpointing:
                function = getattr(part, "_gradient_checkpointing_func", None)
                if isinstance(part, GradientCheckpointingLayer) or function is not None:
                    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
        return False

    # ---- routing ----

    def _route_all(self, given: Mapping[str, Any]) -> None:
        """Let the routers that read all inputs of the model score, those of `register_router`."""
        now = self.routing.passes.current
        for adapter_name, router in self.routing.get_active_routers():
            if "all" in router.branches and not cast(Pass, now).held:
                inputs = {name: value for name, value in given.items() if name not in ("task_ids", "labels")}
                if self.is_causal_lm:
                    inputs = self._hide_what_is_predicted(given, inputs)
                scores, projection = router("all", **inputs)
                for tower in self.routing.towers:
                    self._set_weights(adapter_name, tower, scores, projection)

    def _route(self, given: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Route this tower by its pixels or its embeddings, or note what a router may see of its input layer."""
        now, tower = cast(Pass, self.routing.passes.current), cast(str, self.tower)
        now.tower = tower
        if now.held:
            return args, kwargs
        for adapter_name, router in self.routing.get_active_routers():
            if tower not in router.branches:
                continue
            if self.routing.get_router_source(adapter_name, tower) == "pixels":
                args, kwargs = self._route_pixels(adapter_name, given, args, kwargs)
                continue
            now.masks[tower] = self._find_mask(given)
            if (embeds := given.get("inputs_embeds")) is not None:
                embeds = self.route_embeddings(embeds, cast(nn.Module, self.input_layer))
                args, kwargs = self._replace("inputs_embeds", embeds, args, kwargs)
        return args, kwargs

    def _find_mask(self, given: Mapping[str, Any]) -> torch.Tensor | None:
        mask = read_mask(given.get("attention_mask"))
        return self._find_prompt(given, mask) if self.is_causal_lm else mask

    def _find_prompt(self, given: Mapping[str, Any], mask: torch.Tensor | None) -> torch.Tensor | None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return mask
        labels = given.get("labels")
        generates = self.routing.passes.thread.generation is not None or given.get("past_key_values") is not None
        whole = generates or given.get("logits_to_keep") == 1
        if labels is None and not whole:
            self.routing.warn_of_missing_labels()
        mask = mask if mask is not None and mask.shape == tokens.shape[:2] else None
        return find_prompt(tokens, labels, mask, whole)

    def _hide_what_is_predicted(self, given: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        prompt = self._find_prompt(given, read_mask(given.get("attention_mask")))
        if prompt is None:
            return inputs
        for name in ("input_ids", "inputs_embeds"):
            if (tokens := inputs.get(name)) is not None:
                hidden = ~prompt if tokens.dim() == 2 else ~prompt[:, :, None]
                inputs[name] = tokens.masked_fill(hidden, 0)
        return inputs | {"attention_mask": prompt.long()}

    def _route_pixels(
        self, adapter_name: str, given: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments:
        pixels = given.get("pixel_values")
        if pixels is None:
            raise ValueError(
                f"pixel_values is missing: the router of adapter {adapter_name!r} looks at pixels. Give the model "
                "pixel_values, or create the adapter with router_input='embeddings'."
            )
        router, tower = self.routing.mola_router[adapter_name], cast(str, self.tower)
        scores, projection = router(tower, pixel_values=pixels)
        pixels = self._set_weights(adapter_name, tower, scores, projection, pixels)
        return self._replace("pixel_values", pixels, args, kwargs)

    def route_embeddings(self, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Route this tower by the output of its input layer.

        Args:
            output: Output of the layer, or what stands for it.
            layer: Input layer.

        Returns:
            The output, to use in place of the one given.
        """
        now, tower = cast(Pass, self.routing.passes.current), cast(str, self.tower)
        routers = [
            (adapter_name, router)
            for adapter_name, router in self.routing.get_active_routers()
            if self._reads_embeddings(adapter_name, router)
        ]
        if not routers:
            return output
        by_sample = output.transpose(0, 1) if self.sequence_first else output
        mask = now.masks.get(tower)
        if self.is_causal_lm and (mask is None or mask.shape != by_sample.shape[:2]):
            raise RuntimeError(
                f"The input layer returned {tuple(output.shape)}, in which the prompt cannot be told from what is "
                "predicted; register a router of your own for this model (hf_dissect.mola.register_router)."
            )
        pooled = pool_output(layer, by_sample, mask)
        for adapter_name, router in routers:
            scores, projection = router(tower, pooled=pooled)
            output = cast(torch.Tensor, self._set_weights(adapter_name, tower, scores, projection, output))
        return output

    def _set_weights(
        self,
        adapter_name: str,
        tower: str,
        scores: torch.Tensor,
        projection: torch.Tensor | None,
        carrier: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Put the softmax of a router's scores in force.

        Args:
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
        now = cast(Pass, self.routing.passes.current)
        weights = (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1)
        if projection is not None:
            now.projections[adapter_name, tower] = projection
            if projection.requires_grad:  # in evaluation as well, where some train
                # DDP searches for unused parameters from the model's outputs, so the projection must be reachable.
                weights = weights + 0.0 * projection.sum()
        if now.reentrant and weights.requires_grad:
            if carrier is None:
                raise ValueError(
                    f"The registered router of adapter {adapter_name!r} does not work with reentrant gradient "
                    "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            leaf = weights.detach().requires_grad_()
            carrier, weights = _Carrier.apply(carrier, weights, [leaf]), leaf
        now.weights[adapter_name, tower] = weights
        return carrier

    def _replace(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if name in kwargs or name not in self.names[: len(args)]:
            return args, kwargs | {name: value}
        position = self.names.index(name)
        return (*args[:position], value, *args[position + 1 :]), kwargs

    # ---- after ----

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """End the pass that began here, and add the decorrelation loss to the loss of the model."""
        passes = self.routing.passes
        now = passes.current
        if now is None:
            return None
        if self.tower is not None:
            now.tower = None
        if now.owner is not module:
            return None
        decorrelated = self._add_decorrelation(now, output)
        passes.end(module, output if decorrelated is None else decorrelated)
        if not torch.compiler.is_compiling() and passes.thread.generation is None and not isinstance(output, tuple):
            if self.reuses_encoder and self.tower is not None and hasattr(output, "last_hidden_state"):
                passes.remember(output.last_hidden_state)
            elif self.is_causal_lm and getattr(output, "past_key_values", None) is not None:
                passes.remember(output.past_key_values)
        return decorrelated

    def _add_decorrelation(self, now: Pass, output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None or now.task_ids is None or not now.projections or not self.routing.training:
            return None
        output["loss"] = loss + self.routing.decorrelation_loss(now.task_ids, now.projections)
        return output


class InputLayerHook:
    """A hook that routes by the output of an input layer.

    A copy of the whole model calls the copied entry; a copy of the layer alone still calls the original one.

    Args:
        entry: Entry of the tower of the layer.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        now = self.entry.routing.passes.current
        if now is None or now.held or now.tower != self.entry.tower or output.dim() < 2:
            return None  # for example a decoder that shares the layer, or the embedding of a single token
        return self.entry.route_embeddings(output, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputLayerHook:
        return InputLayerHook(memo.get(id(self.entry), self.entry))


class _Carrier(torch.autograd.Function):
    """The identity on a tensor whose backward pass hands the routing weights the gradient of their leaf.

    Each reentrant checkpoint runs a backward pass of its own, which would go through the router again. The
    checkpointed blocks therefore see a leaf that collects their gradients. The carried tensor is the input of the
    model, so it is reached last on the way back, when the leaf has collected everything. The leaf is passed inside a
    list: if it were a direct input, autograd would run this function before the gradients of layers outside the
    checkpoints arrive.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weights: torch.Tensor, leaf: list[torch.Tensor]) -> torch.Tensor:
        """Return a view of the tensor, any shape, and remember the leaf of the weights `(B, E)`."""
        ctx.leaf = leaf[0]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the incoming gradient for the tensor and the gradient of the leaf for the weights."""
        collected, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, collected, None


# ---- attaching ----


def attach_hooks(routing: Routing, model: nn.Module) -> None:
    """Register the hooks of a new routing on its base model; `detach_hooks` removes them.

    `forward` accepts `task_ids` from then on, so that transformers' `Trainer` keeps such a column, and `generate` holds
    the choice of experts for all of its steps.

    Args:
        routing: Routing to fill.
        model: Base model.
    """
    for tower, module in {None: model, **find_towers(model)}.items():
        entry = Entry(routing, module, tower, model)
        routing.handles += [
            module.register_forward_pre_hook(entry.before, with_kwargs=True, prepend=tower is None),
            module.register_forward_hook(entry.after, with_kwargs=True, always_call=True),
        ]
        if tower is not None:
            routing.entries[tower] = entry
    _wrap_calls(routing, model)


def _wrap_calls(routing: Routing, model: nn.Module) -> None:
    forward = partial(_forward, model.forward)
    signature = inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    if "task_ids" not in signature.parameters:
        task_ids = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters[:last], task_ids, *parameters[last:]]
        )
        routing.wrapped["forward"] = model.__dict__.get("forward")
        model.forward = forward
    if isinstance(generate := getattr(model, "generate", None), Callable):  # type: ignore[arg-type]
        routing.wrapped["generate"] = model.__dict__.get("generate")
        cast(Any, model).generate = update_wrapper(partial(_generate, routing, generate), generate)


def detach_hooks(routing: Routing, model: nn.Module) -> None:
    """Take the hooks off a base model, and give it its own methods back.

    Args:
        routing: Routing of the model.
        model: Base model.
    """
    for handle in routing.handles:
        handle.remove()
    for name, before in routing.wrapped.items():
        del model.__dict__[name]
        if before is not None:
            setattr(model, name, before)


def _forward(forward: Callable[..., Any], *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)  # the hook has taken the tasks


def _generate(
    routing: Routing, generate: Callable[..., Any], *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    with routing.passes.generation(task_ids):
        return generate(*args, **kwargs)


def _count_cached(cache: Any) -> int:
    count = getattr(cache, "get_seq_length", None)
    return int(count()) if count is not None else len(cache)
