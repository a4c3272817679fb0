"""Brings the tasks of a batch to the MoLA adapter of a model, and makes sure beforehand that they fit it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_dissect.data.pairs import PairDataset, PairStream
from hf_dissect.data_collator import model_inputs
from hf_dissect.mola import mola_routing

logger = logging.getLogger(__name__)

TASKS_FILE = "tasks.json"


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model's forward among the keys of a batch, `task_ids` where an adapter routes by task."""
    inputs = model_inputs(batch)
    if "task_id" in batch and _routes_by_task(model):
        inputs["task_ids"] = batch["task_id"]
    return inputs


def representations(model: nn.Module, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the losses of the last forward pass are made of, for `grad_cached_backward`.

    Returns:
        `image_embeds` and `text_embeds` `(B, D)`, and `projections`, which a MoLA router is decorrelated by:
        `(adapter, tower) -> (B, d)`, empty where there are none.
    """
    routing = mola_routing(model)
    return {
        "image_embeds": outputs["image_embeds"],
        "text_embeds": outputs["text_embeds"],
        "projections": {} if routing is None else routing.projections(),
    }


class Decorrelation:
    """The task-wise decorrelation loss of a model's MoLA router, and its mean for the logs."""

    def __init__(self):
        self._since_log: list[torch.Tensor] = []

    def added_to(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        batch: Mapping[str, Any],
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`loss` plus the weighted decorrelation of the batch; as it is without a router or without tasks.

        It is gathered over the ranks: each of them has to ask for it equally often. `projections` are those of the
        batch as `representations` gives them, by default of the last forward pass.
        """
        routing = mola_routing(model) if "task_id" in batch else None
        if routing is None or not routing.decorrelates:
            return loss
        decorrelation = routing.decorrelation_loss(batch["task_id"], projections)
        self._since_log.append(decorrelation.detach())
        return loss + decorrelation

    def state(self) -> list[float]:
        """Its values since the last log, to go on from after a resume."""
        return [value.item() for value in self._since_log]

    def restore(self, values: list[float]) -> None:
        """Go on from what `state` gave."""
        self._since_log = [torch.tensor(value) for value in values]

    def pop_logs(self) -> dict[str, float]:
        """Its mean over this rank's batches since the last call, nothing where there was none."""
        means = {"decorrelation_loss": torch.stack(self._since_log).mean().item()} if self._since_log else {}
        self._since_log = []
        return means


def check_tasks(model: nn.Module, train: Any, evaluation: Any) -> None:
    """Make sure that an adapter that routes by task is told the tasks, and that it has an expert for each.

    Tasks that are names are numbered for the evaluation data as they are for the training data.

    Args:
        model: with or without an adapter.
        train, evaluation: pairs, None, or (evaluation only) a dict of several.

    Raises:
        ValueError: training pairs without tasks, or tasks beyond the experts; of a stream only the former is known.
    """
    names = getattr(train, "task_names", None)
    for pairs in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        if names is not None and isinstance(pairs, PairDataset):
            pairs.number_tasks(names)
    routing = mola_routing(model)
    if routing is None or not routing.needs_task_ids:
        return
    grad = [name for name in routing.active_adapters if routing.mola_config[name].variant == "grad"]
    has_default = all(
        name in routing.fixed_task or routing.mola_config[name].default_task is not None for name in grad
    )
    if train is not None and not has_default and not _knows_tasks(train):
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


def _routes_by_task(model: nn.Module) -> bool:
    routing = mola_routing(model)
    return routing is not None and routing.needs_task_ids


def _knows_tasks(pairs: Any) -> bool:
    if isinstance(pairs, PairDataset | PairStream):
        return pairs.columns.task is not None
    if isinstance(pairs, torch.utils.data.IterableDataset):
        return True  # not read ahead; the adapter itself refuses a batch without tasks
    return "task_id" in pairs[0]


def save_task_names(pairs: Any, folder: str | Path) -> None:
    """Write the names of the tasks, in the order of their numbers, where the tasks of `pairs` are names."""
    names = getattr(pairs, "task_names", None)
    if names is not None:
        (Path(folder) / TASKS_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def number_tasks_as_saved(pairs: Any, folder: str | Path) -> None:
    """Number the tasks of `pairs` that are names as in the training of the model in `folder` (`ValueError`)."""
    file = Path(folder) / TASKS_FILE
    if getattr(pairs, "task_names", None) is None:
        return
    if file.is_file():
        pairs.number_tasks(json.loads(file.read_text(encoding="utf-8")))
    else:
        logger.warning(
            "%s has no %s: tasks are numbered in the alphabetical order of their names.", folder, TASKS_FILE
        )
