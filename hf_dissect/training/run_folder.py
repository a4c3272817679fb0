"""What a finished run leaves behind: the model, the ledger, the figures and the report, all in one folder."""

import dataclasses
import json
import logging
import math
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.pairs import PairDataset
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.models.adapters import describe_adapter
from hf_dissect.objective import label_columns
from hf_dissect.report.data import replace_file
from hf_dissect.report.selection import PairSample, RunSummary, write_report
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.monitor import ObservedPair
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import num_pairs

if TYPE_CHECKING:
    from hf_dissect.trainer import DissectTrainer

logger = logging.getLogger(__name__)

_PACKAGES = ("hf_dissect", "torch", "transformers", "accelerate", "datasets", "peft", "evaluate", "pillow", "numpy")
_PRIVATE_SETTINGS = {
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "initial_ledger"),
    *(
        "push_to_hub",
        "hub_token",
        "hub_model_id",
        "hub_strategy",
        "hub_revision",
        "hub_private_repo",
        "hub_always_push",
    ),
}
_DERIVED_SETTINGS = {"dataloader_pin_memory", "report_to"}  # what the machine has decides them


def write_run_folder(
    trainer: "DissectTrainer",
    *,
    name: str | None = None,
    test_dataset: Any = None,
    more_figures: Callable[[], dict[str, float]] | None = None,
    retrieval: bool = True,
    noise_detection: bool = True,
) -> dict[str, Any]:
    """Evaluate the trained model and write the run folder; called on all ranks, written by the first.

    The folder gets the model (or its adapter) and processor, `ledger.safetensors`, `recipe.yaml` when the run has one,
    `metrics.json`, `report.html`, `report_data.json` (what the report is made of), and a model card, `README.md`, with
    its picture, `report.png`. The final figures are logged as `test_*`, so that trackers show them, too.

    Args:
        trainer: after `train`.
        name: of the run in report and figures; the strategy's by default.
        test_dataset: for the final retrieval figures; the trainer's `eval_dataset` by default.
        more_figures: computes further final figures, such as zero-shot accuracies.
        retrieval: whether to compute the retrieval figures.
        noise_detection: score all training pairs with the final model where the truth is known.

    Returns:
        The content of `metrics.json`.
    """
    # First, so that nothing that follows can cost the trained model; not pushed before the rest is there.
    trainer.save_model(_internal_call=True)
    final = {} if more_figures is None else more_figures()
    unlogged = dict(final)
    dataset = test_dataset if test_dataset is not None else trainer.eval_dataset
    if retrieval and dataset is not None:
        final.update(without_speed(trainer.evaluate(dataset, metric_key_prefix="test"), "test"))
    scored = None
    if noise_detection and getattr(trainer.train_dataset, "knows_truth", False):
        with trainer.times.measure("evaluation"):
            scored = trainer.score_pairs(trainer.train_dataset)
        found = noise_detection_metrics(scored["correlation"], scored["is_clean"])
        found = {f"noise_detection_{key}": value for key, value in found.items()}
        final.update(found)
        unlogged.update(found)
    if unlogged:
        trainer.log({f"test_{key}": float(value) for key, value in unlogged.items()})
    metrics = run_metrics(trainer, name or trainer.strategy.name, final)
    if scored is not None:
        metrics["selection"].update(label_figures(trainer.ledger, scored["sample_id"], scored["is_clean"]))
    if trainer.args.should_save:
        _write_files(trainer, metrics)
    # After all else: PEFT writes a card of its own beside each adapter it saves.
    trainer.model_card.finish(metrics, evaluated="validation" if test_dataset is None else "test")
    if trainer.args.push_to_hub:
        trainer.push_run_folder()
    return metrics


def run_metrics(trainer: "DissectTrainer", name: str, final: dict[str, Any]) -> dict[str, Any]:
    """The content of `metrics.json`: final figures, selection, times, bad rows, settings and versions."""
    return {**metrics_of_this_process(trainer, name, final), "bad_rows": _bad_rows_of_all_ranks(trainer)}


def metrics_of_this_process(trainer: "DissectTrainer", name: str, final: dict[str, Any]) -> dict[str, Any]:
    """What `run_metrics` gives, as far as one process knows it: without the bad rows."""
    spent = trainer.times.so_far()
    seconds = {f"{part}_s": spent.get(part, 0.0) for part in ("data", "scoring", "training", "evaluation")}
    selection = dict(trainer.monitor.run.figures())
    last = trainer.monitor.last_epoch.sums.figures()
    selection.update({f"{key}_last_epoch": value for key, value in last.items()})
    if (ranking := trainer.monitor.ranking_truth()) is not None:
        selection["ranking_auroc_last_epoch"] = noise_detection_metrics(*ranking)["auroc"]
    return _finite(
        {
            "name": name,
            "strategy": trainer.strategy.name,
            "seed": trainer.args.seed,
            "steps": trainer.state.global_step,
            "num_pairs": num_pairs(trainer.train_dataset),
            "final": final,
            "selection": selection,
            "times": {"total_s": sum(seconds.values()), **seconds},
            **({} if (adapter := describe_adapter(trainer.model)) is None else {"adapter": adapter}),
            "settings": changed_settings(trainer.args),
            "versions": {"python": platform.python_version(), **_versions()},
        }
    )


def label_figures(ledger: SampleLedger, sample_id: torch.Tensor, is_clean: torch.Tensor) -> dict[str, float | None]:
    """How well the final labels of pairs `(n,)` tell matched from mismatched ones; pairs without a label are left out.

    Returns:
        `label_auroc` of the soft labels (of two networks, their mean) and `p_clean_auroc`, as far as the ledger has
        the columns.
    """
    figures = {}
    if (labels := soft_labels(ledger, sample_id)) is not None:
        figures["label_auroc"] = noise_detection_metrics(labels, is_clean)["auroc"]
    if "p_clean" in ledger.columns:
        figures["p_clean_auroc"] = noise_detection_metrics(ledger.read("p_clean", sample_id), is_clean)["auroc"]
    return figures


def soft_labels(ledger: SampleLedger, sample_id: torch.Tensor) -> torch.Tensor | None:
    """Soft labels `(n,)` of pairs `(n,)`, of two networks their mean; None if the ledger has none."""
    if not (networks := label_columns(ledger)):
        return None
    return torch.stack([torch.minimum(*(ledger.read(name, sample_id) for name in pair)) for pair in networks]).mean(0)


def _bad_rows_of_all_ranks(trainer: "DissectTrainer") -> dict[str, Any]:
    everywhere = BadRows(trainer.bad_rows.max_fraction)
    everywhere.reasons = dict(gather_object(list(trainer.bad_rows.reasons.items())))
    return everywhere.summary()


def changed_settings(args: DissectTrainingArguments) -> dict[str, Any]:
    """The training arguments that differ from their defaults, without paths and tokens."""
    changed = {"selection_strategy": args.selection_strategy, "selection_ratio": args.selection_ratio}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        plain = isinstance(value, bool | int | float | str | dict | list) or value is None
        default = _default(field)
        # What was None or empty and became false or empty did not change.
        changes = value != default and bool(value or default)
        if field.init and plain and changes and field.name not in _PRIVATE_SETTINGS | _DERIVED_SETTINGS:
            changed[field.name] = value
    return changed


def _default(field: dataclasses.Field) -> Any:
    # Not read from a second instance: to make one resets the state of the processes that the trainer still needs.
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _write_files(trainer: "DissectTrainer", metrics: dict[str, Any]) -> None:
    folder = Path(trainer.args.output_dir)
    write_json(folder / "metrics.json", metrics)
    last = trainer.monitor.last_epoch
    summary = RunSummary(
        name=metrics["name"],
        metrics=metrics,
        log_history=trainer.state.log_history,
        score_histogram=trainer.monitor.score_histogram(),
        best_kept=[_sample(trainer, pair) for pair in last.best_kept],
        worst_dropped=[_sample(trainer, pair) for pair in last.worst_dropped],
    )
    summary.save(folder / "report_data.json")
    write_report(folder / "report.html", [summary], title=_title(trainer, metrics["name"]))


def _title(trainer: "DissectTrainer", name: str) -> str:
    return name if trainer.recipe is None else f"{trainer.recipe.name}: {name}"


def _sample(trainer: "DissectTrainer", pair: ObservedPair) -> PairSample:
    dataset, caption, picture = trainer.train_dataset, "", None
    if isinstance(dataset, PairDataset):
        index = dataset.find(pair.sample_id)
        caption, picture = dataset[index]["caption"], dataset.picture(index)
    ranked_by_differential = trainer.strategy.name == "dissect"
    return PairSample(
        sample_id=pair.sample_id,
        caption=caption,
        correlation=pair.correlation,
        differential=pair.priority if ranked_by_differential else None,
        is_clean=pair.is_clean,
        image=picture,
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name first, so that a half-written file is never found."""
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def without_speed(figures: dict[str, float], prefix: str) -> dict[str, float]:
    """Of an evaluation with a prefix such as "test": what was measured, without the prefix and without the speed."""
    speed = ("_runtime", "_per_second", "_preparation_time", "epoch")
    return {key.removeprefix(f"{prefix}_"): value for key, value in figures.items() if not key.endswith(speed)}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _finite(value: Any) -> Any:
    """JSON knows no NaN: what could not be computed is null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
