"""Adapters merged into their base, so that what is saved is an ordinary model of transformers."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn

from hf_dissect.models.adapters import find_adapted
from hf_dissect.mola import mola_routing


def fix_task(model: nn.Module, task: str | int | None, names: Sequence[str] | None) -> None:
    """Choose the task whose experts answer from now on, for an adapter that has an expert for each task.

    Args:
        model: Model, with or without an adapter.
        task: Name or number of the task; None for the adapter's default.
        names: Names of the tasks by number; None if they have none.

    Raises:
        ValueError: There is no such task, the model has no tasks, or a task must be chosen.
    """
    routing = mola_routing(model)
    configs = [] if routing is None else [routing.mola_config[name] for name in routing.active_adapters]
    if all(config.variant != "grad" for config in configs):
        if task is not None:
            raise ValueError(f"task={task!r}: the model has no experts by task; leave it out")
        return
    count = min(config.num_experts for config in configs)
    allowed = ", ".join(map(str, names or range(count)))
    if task is None:
        if all(config.default_task is not None for config in configs):
            return
        raise ValueError(f"task is missing: the adapter has an expert for each of the tasks {allowed}; choose one")
    number = names.index(str(task)) if names and str(task) in names else _parse_number(task, count)
    if number is None:
        raise ValueError(f"task={task!r}: the adapter has an expert for each of the tasks {allowed}; choose one")
    adapted: Any = find_adapted(model)
    adapted.base_model.set_task(number)


def _parse_number(task: str | int, count: int) -> int | None:
    return int(task) if str(task).isdecimal() and int(task) < count else None


def merge_adapter(model: nn.Module) -> nn.Module:
    """Return the base model with the weights of its adapter added; a model without one as it is.

    Args:
        model: Model of PEFT, or any other.

    Raises:
        ValueError: The adapter cannot be merged, as one whose weights depend on the input; the message says why.
    """
    if not isinstance(model, PeftModel):
        return model
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the adapter cannot be merged into its base: {error}") from error
    merged._hf_peft_config_loaded = False  # else only the adapter would be saved
    return merged
