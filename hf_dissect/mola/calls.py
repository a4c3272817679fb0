"""The calls by which users enter a model: hooks on its towers, and `task_ids` as an argument of its methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from hf_dissect.mola.base_model import find_towers
from hf_dissect.mola.hooks import Entry
from hf_dissect.mola.routing import Routing, get_own_routing


def attach_hooks(routing: Routing, model: nn.Module) -> None:
    """Register the hooks of a new routing on its base model; `detach_hooks` removes them.

    `forward` accepts `task_ids` from then on, so that transformers' `Trainer` keeps such a column, and `generate`
    holds the choice of experts for all of its steps.

    Args:
        routing: Routing to fill.
        model: Base model.
    """
    entered: list[tuple[str | None, nn.Module]] = [(None, model), *find_towers(model).items()]
    for tower, module in entered:
        entry = Entry(routing, module, tower, model)
        routing.handles += [
            module.register_forward_pre_hook(entry.before, with_kwargs=True),
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
    generate = getattr(model, "generate", None)
    if callable(generate) and "model" in routing.entries:
        routing.wrapped["generate"] = model.__dict__.get("generate")
        cast(Any, model).generate = update_wrapper(
            partial(_generate, routing.entries["model"], model, generate), generate
        )


def pass_task_ids_on(peft_model: type[PeftModel]) -> None:
    """Let the `forward` of a class of PEFT hand `task_ids` to a MoLA adapter; it keeps them to itself otherwise.

    Args:
        peft_model: Class such as `PeftModelForCausalLM`, whose `forward` has an argument `task_ids`.
    """
    forward = peft_model.forward

    @wraps(forward)
    def forward_with_tasks(self: PeftModel, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if (routing := get_own_routing(self.get_base_model())) is None:
            return forward(self, *args, task_ids=task_ids, **kwargs)
        if task_ids is None:  # nothing to note, which a compiled model could not
            return forward(self, *args, **kwargs)
        with routing.passes.given(task_ids):
            return forward(self, *args, **kwargs)

    peft_model.forward = forward_with_tasks  # type: ignore[method-assign]


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


def _generate(entry: Entry, model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    passes = entry.routing.passes
    with passes.generation(kwargs.pop("task_ids", None)) as generation:
        if entry.is_causal_lm:
            inputs = kwargs.get("inputs", args[0] if args else None)
            entry.route_prompt(model, kwargs if inputs is None else {"input_ids": inputs} | kwargs)
        found = generate(*args, **kwargs)
        if (cache := getattr(found, "past_key_values", None)) is not None:
            passes.remember(cache, generation)  # for the next turn of a conversation
    return found
