"""Check that the tasks of the pairs have experts in an adapter that routes by task."""

from typing import Any

import torch

from hf_dissect.data.pairs import PairDataset, PairStream
from hf_dissect.data.tasks import number_tasks_alike
from hf_dissect.mola import mola_routing


def check_tasks(model: torch.nn.Module, train: Any, evaluation: Any) -> None:
    """Check that pairs have tasks if an adapter routes by task, and that the adapter has an expert for each task.

    Named tasks of the evaluation data are renumbered as in the training data, see `number_tasks_alike`. The tasks of a
    stream are not known.

    Args:
        model: Model, with or without an adapter.
        train: Training pairs, or None.
        evaluation: Pairs, a dict of several, or None.

    Raises:
        ValueError: The training pairs have no tasks, or the adapter lacks an expert for a task.
    """
    number_tasks_alike(train, evaluation)
    routing = mola_routing(model)
    if routing is None or not routing.needs_task_ids:
        return
    grad = [name for name in routing.active_adapters if routing.mola_config[name].variant == "grad"]
    has_default = all(
        name in routing.fixed_task or routing.mola_config[name].default_task is not None for name in grad
    )
    if train is not None and not has_default and not has_tasks(train):
        raise ValueError(
            "train_dataset has no tasks, but the MoLA adapter of variant 'grad' trains the expert of each pair's "
            "task; name the column with task_column (data.task_column in a recipe), or use the variant 'router'."
        )
    num_experts = min(routing.mola_config[name].num_experts for name in grad)
    parts = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for argument, pairs in {"train_dataset": train, **parts}.items():
        tasks = getattr(pairs, "task_ids", None)
        if tasks is None:
            continue
        low, high = int(tasks.min()), int(tasks.max())
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"{argument} has task {low if low < 0 else high}, but the adapter has num_experts={num_experts}, "
                f"an expert for each of the tasks 0 to {num_experts - 1}; set num_experts (adapter.num_experts in a "
                "recipe) to the number of tasks, or number the tasks from 0."
            )


def has_tasks(pairs: Any) -> bool:
    """Return True if pairs have tasks, or may have some that are not known before they are read."""
    if isinstance(pairs, PairDataset | PairStream):
        return pairs.columns.task is not None
    if isinstance(pairs, torch.utils.data.IterableDataset):
        return True  # unknown before it is read; the adapter rejects a batch without tasks
    return "task_id" in pairs[0]
