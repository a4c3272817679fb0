"""Figures of a distillation for `metrics.json`, made of what the trainer knows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerState

from hf_dissect.distillation.diagnostics import RowCounts
from hf_dissect.distillation.training_args import OWN_FIELDS, AuxiliaryDistillationArguments
from hf_dissect.distributed import Ranks
from hf_dissect.evaluation import format_results_table
from hf_dissect.training.run_folder import installed_versions, times_of_parts
from hf_dissect.training.time_spent import TimeSpent

_PACKAGES = ("hf_dissect", "torch", "transformers", "accelerate", "datasets", "numpy")
_TRAINING = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
_TRAINING += ("learning_rate", "weight_decay", "warmup_steps", "bf16", "fp16", "seed")


def distillation_metrics(
    *,
    args: AuxiliaryDistillationArguments,
    name: str,
    auxiliaries: Sequence[str],
    state: TrainerState,
    warnings: Sequence[str],
    rows: RowCounts,
    times: TimeSpent,
    final: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `metrics.json` as far as one process knows it: with the rows that it has seen itself.

    Args:
        args: Arguments of the run.
        name: Name of the run.
        auxiliaries: Columns of the auxiliary modalities.
        state: State of the Trainer.
        warnings: Warnings that were given, see `Watch`.
        rows: Rows that lack something.
        times: Seconds of the parts of the run.
        final: Final figures.
    """
    return {
        "name": name,
        "method": args.method,
        "term_weights": dataclasses.asdict(args.weights),
        "student": args.student_column,
        "auxiliaries": list(auxiliaries),
        "seed": args.seed,
        "steps": state.global_step,
        "final": dict(final),
        "diagnostics": _last_diagnostics(state.log_history),
        "warnings": list(warnings),
        "rows": rows.summary(),
        "times": times_of_parts(times.so_far(), ("data", "training", "evaluation")),
        "settings": {name: getattr(args, name) for name in (*_TRAINING, *OWN_FIELDS)},
        "versions": installed_versions(_PACKAGES),
    }


def summarise_rows(rows: RowCounts, ranks: Ranks) -> dict[str, Any]:
    """Return the rows of all ranks that lack something; called on all of them."""
    everywhere = RowCounts(rows.max_bad_fraction, rows.num_rows)
    everywhere.load_state_dict(RowCounts.join_states(ranks.gather_objects(rows.state_dict())))
    return everywhere.summary()


def figures_table(figures: Mapping[str, float], method: str | None = None) -> str:
    """Format accuracies and R@1, in per cent, as a table of one row that `method` names."""
    row = {name: 100 * value for name, value in figures.items() if name.endswith(("_accuracy", "R@1"))}
    if not row:
        return "Nothing was evaluated: there are no validation or test rows."
    named = {} if method is None else {"method": method}
    return format_results_table([named | row], [*named, *row], decimals=1)


def _last_diagnostics(log_history: list[dict]) -> dict[str, float]:
    logged = next((entry for entry in reversed(log_history) if "loss" in entry), {})
    known = ("information_", "discriminator_", "generator_", "loss_")
    return {name: value for name, value in logged.items() if name.startswith(known) or name.endswith("_accuracy")}
