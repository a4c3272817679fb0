"""Summary of a distillation: its part of `metrics.json`, its report, and what its card shows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from hf_dissect.distillation.diagnostics import RowCounts, Watch
from hf_dissect.distillation.measurement import Measurement
from hf_dissect.distillation.networks import DistillationNetworks
from hf_dissect.distillation.training_args import OWN_FIELDS, DistillationTrainingArguments
from hf_dissect.distributed import Ranks
from hf_dissect.report.data import PairSample, RunSummary
from hf_dissect.report.distillation import write_distillation_report
from hf_dissect.tracking.alerts import Alert, find_skipped_rows
from hf_dissect.training.run_state import join_over_ranks

SHOWN_SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "bf16",
    "fp16",
    "seed",
    *(name for name in OWN_FIELDS if name not in ("check_reload", "measure_information", "pilot_epochs")),
)
"""Arguments that `metrics.json` holds, including those with their default."""


_TITLES = {"teacher": "The teacher weakens", "discriminator": "The discriminator saturates"}


class DistillationSummary:
    """Reporter of a distillation, see `hf_dissect.training.summary.Summary`.

    Args:
        args: Arguments of the run.
        auxiliaries: Columns of the auxiliary modalities.
        recipe: Recipe of the run, if it has one.
        watch: Warnings of the run.
        rows: Rows that lack something.
        processor: Image processor or tokenizer of the student's modality; None for arrays.
        shape: Shape of the array that the student reads; empty for pictures and text.
        measurement: Measurements of what the teacher knows.
    """

    def __init__(
        self,
        args: DistillationTrainingArguments,
        *,
        auxiliaries: Sequence[str],
        recipe: Any,
        watch: Watch,
        rows: RowCounts,
        processor: Any,
        shape: Sequence[int],
        measurement: Measurement,
    ) -> None:
        self._args = args
        self._auxiliaries = list(auxiliaries)
        self._recipe = recipe
        self._watch = watch
        self._rows = rows
        self._processor = processor
        self._shape = shape
        self._measurement = measurement

    def collect_metrics(self, model: nn.Module, log_history: list[dict]) -> dict[str, Any]:
        """Return method, modalities, diagnostics, rows and settings."""
        args, information = self._args, self._measurement.describe()
        return {
            "name": args.method if self._recipe is None else self._recipe.name,
            "method": args.method,
            "term_weights": dataclasses.asdict(args.weights),
            "student": args.student_column,
            "auxiliaries": self._auxiliaries,
            "diagnostics": _last_diagnostics(log_history),
            "warnings": self._watch.warned,
            "rows": self._rows.summary(),
            "settings": {name: getattr(args, name) for name in SHOWN_SETTINGS},
            **({"information": information} if information else {}),
        }

    def gather_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Return the rows of all ranks that lack something."""
        return {"rows": join_over_ranks(self._rows, ranks).summary()}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the recipe, the student, and what reads its modality."""
        return {
            "recipe": self._recipe,
            "student": cast(DistillationNetworks, model).student,
            "processor": self._processor,
            "shape": self._shape,
        }

    def summarize(self, metrics: dict[str, Any]) -> tuple[RunSummary, str]:
        """Return the run so far, with the rows of this process that lack something, and its title."""
        metrics = {**metrics, "rows": self._rows.summary()}
        return RunSummary(metrics["name"], metrics), f"{metrics['name']}: {metrics['method']}"

    def show_pairs(self) -> dict[str, list[PairSample]]:
        """Return no pairs, since a distillation does not choose."""
        return {}

    def find_alerts(self, log_history: Sequence[Mapping[str, Any]], progress: float) -> list[Alert]:
        """Return the warnings about teacher and discriminator, and many rows that cannot be used."""
        bad = sum(not state.usable for state in self._rows.states.values())
        limit = self._rows.max_bad_fraction
        return [
            *(Alert(subject, _TITLES[subject], text, warned=True) for subject, text in self._watch.texts.items()),
            *find_skipped_rows(bad, self._rows.num_rows, limit, "max_bad_fraction"),
        ]

    def write_report(self, folder: Path, metrics: dict[str, Any], log_history: list[dict]) -> None:
        """Write `report.html`."""
        write_distillation_report(folder / "report.html", metrics, log_history)


def _last_diagnostics(log_history: list[dict]) -> dict[str, float]:
    """Return the last logged figures of the terms, the discriminator and the accuracies in training."""
    logged: dict[str, float] = next((entry for entry in reversed(log_history) if "loss" in entry), {})
    known = ("information_", "discriminator_", "generator_", "loss_")
    return {name: value for name, value in logged.items() if name.startswith(known) or name.endswith("_accuracy")}
