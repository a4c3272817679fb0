"""The hooks on a base model, through which routing sees each call, and its input before the adapted layers do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from hf_dissect.mola.arguments import count_cached, find_prompts, find_samples, hide_what_is_predicted, read_mask
from hf_dissect.mola.base_model import (
    find_input_layer,
    has_reentrant_checkpoints,
    is_causal_lm,
    is_sequence_first,
    pool_output,
)
from hf_dissect.mola.passes import Pass
from hf_dissect.mola.router import Carrier, Router
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
        routing = self.routing
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
            if not self.routing.mola_router:
                self.routing.training = module.training  # it is not a module of the model
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
        samples = find_samples(given)
        size = len(samples) if samples is not None and samples.dim() else None
        new = Pass(module, size=size)
        new.device = None if samples is None else samples.device
        if torch.is_grad_enabled() and routing.training:
            new.reentrant = has_reentrant_checkpoints(self.checkpoints)
        if (earlier := self._find_earlier(given)) is not None:
            new.hold(earlier)
        task_ids = given.get("task_ids")
        if task_ids is None:
            task_ids = thread.task_ids
        if task_ids is None and thread.generation is not None:
            task_ids = thread.generation.task_ids
            task_ids = None if task_ids is None else new.expand(task_ids)
        routing.choose_tasks(new, task_ids)
        return new

    def _find_earlier(self, given: Mapping[str, Any]) -> Pass | None:
        """Return the pass that this call continues: that of the encoder, or of the prompt in the cache."""
        passes = self.routing.passes
        outputs, cache = given.get("encoder_outputs"), given.get("past_key_values")
        if self.reuses_encoder and self.tower is None:
            return None if outputs is None else passes.generated or passes.find(outputs[0])
        if not self.is_causal_lm:
            return None
        if passes.generated is not None:
            return passes.generated
        if cache is None or not count_cached(cache):
            return None
        earlier = passes.find(cache)
        if earlier is None and any(True for _ in self.routing.get_active_routers()):
            raise RuntimeError(
                "The prompt in past_key_values was not routed by this adapter: its tokens went through the model "
                "without it, or in another model. Let the model read the prompt with the adapter switched on first."
            )
        return earlier

    # ---- routing ----

    @torch.no_grad()
    def route_prompt(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Route a language model by the prompt of `generate`, which may call parts of the model first.

        Args:
            module: Base model.
            given: Arguments of `generate`, with `input_ids` or `inputs_embeds`.
        """
        routing, ids = self.routing, given.get("input_ids")
        has_routers = any(True for _ in routing.get_active_routers())
        if not has_routers or (ids is None and given.get("inputs_embeds") is None):
            return
        routing.passes.begin(self._make_pass(module, {name: v for name, v in given.items() if name != "task_ids"}))
        try:
            self._route_all(given)
            self.hook_input_layer(module)
            self._route(given, (), {})
            now = cast(Pass, routing.passes.current)
            if self.input_layer is not None and given.get("inputs_embeds") is None and not now.held:
                self.input_layer(cast(torch.Tensor, ids).T if self.sequence_first else ids)
        finally:
            routing.passes.end(module, None)

    def _route_all(self, given: Mapping[str, Any]) -> None:
        """Let the routers that read all inputs of the model score, those of `register_router`."""
        if cast(Pass, self.routing.passes.current).held:
            return
        for adapter_name, router in self.routing.get_active_routers():
            if "all" in router.branches:
                inputs = {name: value for name, value in given.items() if name != "task_ids"}
                if self.is_causal_lm:
                    inputs = hide_what_is_predicted(inputs, self._find_mask(given))
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
        if not self.is_causal_lm:
            return read_mask(given.get("attention_mask"))
        generates = self.routing.passes.thread.generation is not None or given.get("past_key_values") is not None
        kept = given.get("logits_to_keep")
        whole = generates or (isinstance(kept, int) and kept == 1)
        if given.get("labels") is None and not whole:
            self.routing.warn_of_missing_labels()
        return find_prompts(given, whole)

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
                f"The input layer returned {tuple(output.shape)}, so that the prompt cannot be found in it; "
                "register a router of your own for this model (hf_dissect.mola.register_router)."
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
            carrier, weights = Carrier.apply(carrier, weights, [leaf]), leaf
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
                passes.remember(output.last_hidden_state, now)
            elif self.is_causal_lm and getattr(output, "past_key_values", None) is not None:
                passes.remember(output.past_key_values, now)
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
        """Route by the output, and return what takes its place; None to keep it."""
        now = self.entry.routing.passes.current
        if now is None or now.held or now.tower != self.entry.tower or output.dim() < 2:
            return None  # for example a decoder that shares the layer, or the embedding of a single token
        return self.entry.route_embeddings(output, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputLayerHook:
        return InputLayerHook(memo.get(id(self.entry), self.entry))
