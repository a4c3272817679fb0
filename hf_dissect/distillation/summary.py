"""What a finished distillation leaves behind beside the student: figures, a report and a card."""

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from hf_dissect.distillation.diagnostics import RowCounts
from hf_dissect.distillation.training_args import OWN_FIELDS
from hf_dissect.evaluation import format_results_table
from hf_dissect.report.distillation import write_distillation_report
from hf_dissect.training.run_folder import without_speed, write_json

if TYPE_CHECKING:
    from hf_dissect.distillation.trainer import AuxiliaryDistillationTrainer

_PACKAGES = ("hf_dissect", "torch", "transformers", "accelerate", "datasets", "numpy")
_TRAINING = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
_TRAINING += ("learning_rate", "weight_decay", "warmup_steps", "bf16", "fp16", "seed")


def write_distillation_folder(trainer: "AuxiliaryDistillationTrainer", test_dataset: Any = None) -> dict[str, Any]:
    """Evaluate the trained networks and write the run folder; called on all ranks, written by the first.

    The folder gets the student (`config.json`, `model.safetensors`), its encoder alone (`encoder/`), `recipe.yaml`
    when the run has one, `metrics.json`, `report.html` and a model card, `README.md`; with `push_to_hub` it is
    published.

    Args:
        trainer: after `train`.
        test_dataset: for the final figures; the trainer's `eval_dataset` by default.

    Returns:
        The content of `metrics.json`.
    """
    # First, so that nothing that follows can cost the trained model; not pushed before the rest is there.
    trainer.save_model(_internal_call=True)
    dataset = trainer.eval_dataset if test_dataset is None else test_dataset
    final = {} if dataset is None else without_speed(trainer.evaluate(dataset, metric_key_prefix="final"), "final")
    metrics = distillation_metrics(trainer, final)
    if trainer.args.should_save:
        folder = Path(trainer.args.output_dir)
        write_json(folder / "metrics.json", metrics)
        write_distillation_report(folder / "report.html", metrics, trainer.state.log_history)
    trainer.model_card.finish(metrics, evaluated="validation" if test_dataset is None else "test")
    if trainer.args.push_to_hub:
        trainer.push_run_folder()
    return metrics


def distillation_metrics(trainer: "AuxiliaryDistillationTrainer", final: dict[str, float]) -> dict[str, Any]:
    """The content of `metrics.json`: final figures, the last logged diagnostics, rows, times, settings, versions."""
    return metrics_of_this_process(trainer, final) | {"rows": _rows_of_all_ranks(trainer)}


def metrics_of_this_process(trainer: "AuxiliaryDistillationTrainer", final: dict[str, float]) -> dict[str, Any]:
    """What `distillation_metrics` gives, as far as one process knows it: with the rows that it has seen itself."""
    seconds = {f"{part}_s": trainer.times[part] for part in ("data", "training", "evaluation")}
    return {
        "name": trainer.args.method if trainer.recipe is None else trainer.recipe.name,
        "method": trainer.args.method,
        "term_weights": dataclasses.asdict(trainer.args.weights),
        "student": trainer.args.student_column,
        "auxiliaries": trainer.modalities[1:],
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "final": final,
        "diagnostics": _last_diagnostics(trainer.state.log_history),
        "warnings": trainer.watch.warned,
        "rows": trainer.rows.summary(),
        "times": {"total_s": sum(seconds.values()), **seconds},
        "settings": {name: getattr(trainer.args, name) for name in (*_TRAINING, *OWN_FIELDS)},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
    }


def figures_table(figures: Mapping[str, float], method: str | None = None) -> str:
    """Accuracies and R@1 in per cent, as text; `method` names the row."""
    row = {name: 100 * value for name, value in figures.items() if name.endswith(("_accuracy", "R@1"))}
    if not row:
        return "Nothing was evaluated: there are no validation or test rows."
    named = {} if method is None else {"method": method}
    return format_results_table([named | row], [*named, *row], decimals=1)


def _last_diagnostics(log_history: list[dict]) -> dict[str, float]:
    logged = next((entry for entry in reversed(log_history) if "loss" in entry), {})
    known = ("information_", "discriminator_", "generator_", "loss_")
    return {name: value for name, value in logged.items() if name.startswith(known) or name.endswith("_accuracy")}


def _rows_of_all_ranks(trainer: "AuxiliaryDistillationTrainer") -> dict[str, Any]:
    everywhere = RowCounts(trainer.rows.max_bad_fraction, trainer.rows.num_rows)
    everywhere.states = dict(gather_object(list(trainer.rows.states.items())))
    return everywhere.summary()
