"""Weights of the experts by task, which show what a MoLA router learnt to tell apart."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.mola import mola_routing
from hf_dissect.mola.routing import Routing
from hf_dissect.selection.loop_hooks import Batch
from hf_dissect.selection.scoring import evaluation_mode

MAX_PAIRS = 2048
"""Largest number of pairs whose weights are measured, so that the cost does not grow with the data."""
MAX_TASKS = 40
"""Largest number of tasks whose weights are kept, those with most pairs."""

Task: TypeAlias = str | int | None
"""Name of a task, its number where it has no name, or None for pairs without tasks."""

_NO_TASK = torch.iinfo(torch.int64).min
_SHUFFLES, _SEED = 10, 0
_DIGITS = 6


@dataclass
class RoutedPairs:
    """Weights that a router gives to the experts for `n` pairs.

    Args:
        weights: Weights by tower, `(n, E)` each.
        tasks: Tasks of the pairs.
        unreadable: Number of further pairs that could not be read.
    """

    weights: dict[str, torch.Tensor]
    tasks: list[Task]
    unreadable: int = 0


def has_router(model: nn.Module) -> bool:
    """Return True if a model, wrapped or not, has an active MoLA adapter with a router."""
    routing = mola_routing(model)
    return routing is not None and any(routing.get_active_routers())


def read_expert_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights `(B, E)` of the last forward pass by tower, and by adapter where several have a router."""
    routing = mola_routing(model)
    names = [] if routing is None else [name for name, _ in routing.get_active_routers()]
    return {
        tower if len(names) == 1 else f"{tower} ({name})": weights
        for name in names
        for tower, weights in routing.last_weights(name).items()  # type: ignore[union-attr]  # there are names
    }


@torch.no_grad()
def route_pairs(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    prepare: Callable[[Batch], Batch],
    autocast: Callable[[], AbstractContextManager],
    gather: Callable[[Batch], Batch],
    task_names: Sequence[str] | None = None,
    limit: int = MAX_PAIRS,
) -> RoutedPairs:
    """Return the weights that a model's router gives to the experts for pairs; every rank calls this function.

    The model is called with all pairs, also where pairs share an image, so that each pair counts.

    Args:
        model: Dual encoder with a router, wrapped or not.
        batches: Batches of a `SelectionCollator`.
        prepare: Function that moves a batch to the device.
        autocast: Function that returns the context of mixed precision.
        gather: Function that joins columns over the ranks and drops the rows that fill the last batch.
        task_names: Names of the tasks by number; None where tasks are numbers.
        limit: Number of pairs after which no further batch is read.
    """
    routing = cast(Routing, mola_routing(model))
    parts: list[dict[str, torch.Tensor]] = []
    count = 0
    with evaluation_mode(model):
        for batch in map(prepare, batches):
            routing.passes.thread.last = None  # so that no weights of an earlier pass are read
            with autocast():
                model(**forward_inputs(model, batch))
            columns = {f"tower {tower}": weights.float() for tower, weights in read_expert_weights(model).items()}
            zeros = torch.zeros_like(batch["sample_id"])
            columns["bad_reason"] = batch.get("bad_reason", zeros)
            columns["task_id"] = batch.get("task_id", zeros + _NO_TASK)
            parts.append({name: values.cpu() for name, values in gather(columns).items()})
            count += len(parts[-1]["task_id"])
            if count >= limit:
                break
    if not parts:
        return RoutedPairs({}, [])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    good = joined.pop("bad_reason") == 0
    numbers = joined.pop("task_id")[good].tolist()
    return RoutedPairs(
        weights={name.removeprefix("tower "): values[good] for name, values in joined.items()},
        tasks=[_name_task(number, task_names or ()) for number in numbers],
        unreadable=int((~good).sum()),
    )


def _name_task(number: int, names: Sequence[str]) -> Task:
    if number == _NO_TASK:
        return None
    return names[number] if 0 <= number < len(names) else number


def average_by_task(parts: Sequence[RoutedPairs], known_tasks: Iterable[Task] = ()) -> dict[str, Any]:
    """Return the mean weights of each task, and how far apart those of two tasks are.

    Args:
        parts: Pairs of one or several data sets, routed by the same model.
        known_tasks: Tasks that have a row even without pairs, in the order of the rows.

    Returns:
        - `pairs`: number of pairs, and `unreadable`: number of those that could not be read.
        - `tasks`: tasks, at most `MAX_TASKS`, those with most pairs; `pairs_by_task`: number of pairs of each; and
          `further_tasks`: number of tasks that are left out.
        - `towers`: for each tower, `weights`: means, one row for each task and a column for each expert, None where
          a weight is not finite or there is no pair; `distance`: mean total-variation distance between the rows of two
          tasks, 0 if all are alike and 1 if no two share an expert; `distance_by_chance`: the same with the tasks of
          the pairs shuffled. Distances are None without two tasks, and where a weight is not finite.
    """
    labels = [task for part in parts for task in part.tasks]
    counts = Counter(labels)
    tasks = list(dict.fromkeys([*known_tasks, *sorted(counts, key=_order_tasks)]))
    row_of = {task: row for row, task in enumerate(tasks)}
    rows = torch.tensor([row_of[task] for task in labels], dtype=torch.int64)
    shown = sorted(sorted(range(len(tasks)), key=lambda row: -counts[tasks[row]])[:MAX_TASKS])
    towers = {}
    for tower in dict.fromkeys(name for part in parts for name in part.weights):
        weights = torch.cat([part.weights[tower] for part in parts if tower in part.weights]).double()
        means = _average(weights, rows, len(tasks))
        generator = torch.Generator().manual_seed(_SEED)
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(_SHUFFLES)]
        by_chance = [_measure_distance(_average(weights, rows[order], len(tasks)), rows) for order in orders]
        towers[tower] = {
            "weights": [[_to_plain(value) for value in means[row].tolist()] for row in shown],
            "distance": _to_plain(_measure_distance(means, rows)),
            "distance_by_chance": _to_plain(sum(by_chance) / len(by_chance)),
        }
    return {
        "pairs": len(labels),
        "unreadable": sum(part.unreadable for part in parts),
        "tasks": [tasks[row] for row in shown],
        "pairs_by_task": [counts[tasks[row]] for row in shown],
        "further_tasks": len(tasks) - len(shown),
        "towers": towers,
    }


def _order_tasks(task: Task) -> tuple[bool, bool, Any]:
    return task is None, isinstance(task, str), task


def _average(weights: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean of the weights of each row, float64 `(count, E)`; NaN for a row without pairs."""
    sums = torch.zeros(count, weights.shape[1], dtype=torch.float64).index_add_(0, rows, weights)
    return sums / torch.bincount(rows, minlength=count)[:, None]


def _measure_distance(means: torch.Tensor, rows: torch.Tensor) -> float:
    """Return the mean total-variation distance between two rows that have pairs; NaN without two of them."""
    measured = means[rows.unique()]
    return float(torch.pdist(measured, p=1).mean()) / 2 if len(measured) > 1 else math.nan


def _to_plain(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None


def find_task_names(*data: Any) -> list[str] | None:
    """Return the names of the tasks, from the first of some data that has them; None where tasks are numbers."""
    return next((names for pairs in data if (names := getattr(pairs, "task_names", None)) is not None), None)


def list_tasks(pairs: Any) -> list[Task]:
    """Return the tasks of pairs in the order of their numbers; none where they are not known."""
    numbers = getattr(pairs, "task_ids", None)
    names = find_task_names(pairs) or ()
    return [] if numbers is None else [_name_task(number, names) for number in np.unique(numbers).tolist()]
