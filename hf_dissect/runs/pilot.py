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
from hf_dissect.distillation.measurement import read_groups
from hf_dissect.distillation.recipe import DistillationRecipe
from hf_dissect.distillation.training_data import Columns
from hf_dissect.runs.distillation_trainer import build_trainer
from hf_dissect.runs.training import show_progress, train_to_end
from hf_dissect.training.interruption import StoppedBySignal

logger = logging.getLogger(__name__)

# The pilot writes nothing, sends nothing and evaluates nothing on the way.
_QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "average_weights": None,
    "push_to_hub": False,
    "report_to": "none",
}

CHOICES = ("student", "hinton", "amid")
"""Methods that a pilot chooses from."""
PILOT_WEIGHTS = {"teacher_task": 1.0, "auxiliary_task": 1.0}
"""Weights of the terms of a pilot next to the student's task."""


class StoppedInPilot(StoppedBySignal):
    """Exit after SIGTERM that came in a pilot, of which nothing is kept."""

    def __str__(self) -> str:
        return "Stopped by SIGTERM in the pilot of distillation.method auto; nothing is kept of it, so start again."


def choose_method(recipe: DistillationRecipe, splits: Mapping[str, Columns]) -> Criterion:
    """Choose student, hinton or amid by a short training on a part of the training rows.

    Student, teacher and auxiliaries learn their tasks for a share of the run's epochs (`distillation.pilot_epochs`) on
    four fifths of the training rows, by `data.group_column` where there is one. The criterion is measured on the rest.
    Validation and test rows are not read. Every rank calls this function, and all get the same result.

    Args:
        recipe: Recipe of the run, of any method; it needs auxiliaries.
        splits: Splits by name, as from `hf_dissect.runs.distil.load_columns`.

    Returns:
        The criterion, whose `method` is the choice.

    Raises:
        ValueError: Settings and data do not fit.
    """
    if not recipe.auxiliaries:
        raise ValueError("auxiliaries: missing; a pilot compares the student with a teacher that reads at least one.")
    start = time.perf_counter()
    train = splits["train"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(_make_pilot(recipe, folder), {"train": train})
        trainer.remove_callback(PrinterCallback)
        rows: Any = trainer.train_dataset
        own, held_out = hold_out(rows.label_numbers, read_groups(recipe, train))
        trainer.train_dataset = Subset(rows, own)
        if len(own) < trainer.args.train_batch_size * trainer.ranks.count:
            trainer.args.dataloader_drop_last = False  # otherwise there would be no batch
        show_progress(trainer, "pilot")
        try:
            train_to_end(trainer, None)
        except StoppedBySignal as stop:
            raise StoppedInPilot(stop.checkpoint) from None
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


def replace_method(recipe: DistillationRecipe, method: str) -> DistillationRecipe:
    """Return the recipe with another method."""
    return dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, method=method))


def _make_pilot(recipe: DistillationRecipe, folder: str) -> DistillationRecipe:
    """Return the recipe of a pilot, in which student, teacher and auxiliaries learn their tasks and nothing else."""
    share = recipe.distillation.pilot_epochs
    training = recipe.training | _QUIET | {"output_dir": folder}
    if (steps := training.get("max_steps", -1)) > 0:
        training["max_steps"] = max(1, math.ceil(steps * share))
    else:
        epochs = training.get("num_train_epochs", 3.0)
        training["num_train_epochs"] = max(min(1.0, epochs), epochs * share)
    if (warmup := training.get("warmup_steps", 0)) >= 1:  # below 1, it is a share of the steps
        training["warmup_steps"] = int(warmup * share)
    distillation = dataclasses.replace(
        recipe.distillation,
        method="student",
        term_weights=dict(PILOT_WEIGHTS),
        measure_information=False,
        check_reload=False,
    )
    return dataclasses.replace(recipe, training=training, distillation=distillation)
