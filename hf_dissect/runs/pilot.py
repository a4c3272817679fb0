"""Pilot of a distillation: a short training on a part of the training rows that chooses the method of the run."""

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PrinterCallback

from hf_dissect.distillation.criterion import Criterion, RowPart, hold_out, measure_criterion
from hf_dissect.distillation.recipe import DistillationRecipe
from hf_dissect.distillation.training_data import Columns, list_columns
from hf_dissect.runs.distil import build_trainer
from hf_dissect.runs.training import train_to_end

logger = logging.getLogger(__name__)

# The pilot writes nothing, sends nothing and evaluates nothing on the way.
_QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "average_weights": None,
    "push_to_hub": False,
    "report_to": "none",
}

PILOT_WEIGHTS = {"teacher_task": 1.0, "auxiliary_task": 1.0}
"""Weights of the terms of a pilot next to the student's task."""


def choose_method(recipe: DistillationRecipe, splits: Mapping[str, Columns]) -> Criterion:
    """Choose student, hinton or amid by a short training on a part of the training rows.

    Student, teacher and auxiliaries learn their tasks for a share of the run's epochs (`distillation.pilot_epochs`) on
    four fifths of the training rows, by `data.group_column` where there is one. The criterion is measured on the others.
    Validation and test rows are not read. Every rank calls this function, and all get the same result.

    Args:
        recipe: Recipe of the run, of any method; it needs auxiliaries.
        splits: Splits by name, as from `hf_dissect.runs.distil.load_columns`.

    Returns:
        The criterion, whose `method` is the choice.

    Raises:
        ValueError: Settings and data do not fit.
    """
    start = time.perf_counter()
    train = splits["train"]
    group_column = recipe.data.group_column
    groups = train[group_column] if group_column is not None and group_column in list_columns(train) else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(_make_pilot(recipe, folder), {"train": train})
        trainer.remove_callback(PrinterCallback)
        rows: Any = trainer.train_dataset
        own, held_out = hold_out(len(rows), groups)
        trainer.train_dataset = Subset(rows, own)
        train_to_end(trainer, None)
        criterion = measure_criterion(
            trainer.model,
            trainer.data_collator,
            RowPart(rows, own),
            RowPart(rows, held_out),
            described=f"{len(held_out)} training rows that the pilot did not train on",
            batch_size=trainer.args.eval_batch_size,
        )
        criterion = trainer.ranks.gather_objects(criterion)[0]
    del trainer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dataclasses.replace(criterion, seconds=time.perf_counter() - start)


def _make_pilot(recipe: DistillationRecipe, folder: str) -> DistillationRecipe:
    """Return the recipe of a pilot, in which student, teacher and auxiliaries learn their tasks and nothing else."""
    share = recipe.distillation.pilot_epochs
    training = recipe.training | _QUIET | {"output_dir": folder}
    if (steps := training.get("max_steps", -1)) > 0:
        training["max_steps"] = max(1, math.ceil(steps * share))
    else:
        training["num_train_epochs"] = max(1.0, training.get("num_train_epochs", 3.0) * share)
    distillation = dataclasses.replace(
        recipe.distillation,
        method="student",
        term_weights=dict(PILOT_WEIGHTS),
        measure_information=False,
        check_reload=False,
    )
    return dataclasses.replace(recipe, training=training, distillation=distillation)
