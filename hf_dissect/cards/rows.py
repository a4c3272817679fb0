"""Rows of the tables in a card: data, training, adapter, hyper-parameters, results and noise."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_dissect.cards.metadata import DATA_NAMES
from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.data.noise_kinds import describe_noise
from hf_dissect.report.tables import (
    as_mapping,
    collect_run_figures,
    describe_averaging,
    format_number,
    list_skipped_shards,
    results_table,
    select_final_figures,
)

if TYPE_CHECKING:
    from hf_dissect.recipe.file import RecipeFile
    from hf_dissect.recipe.recipe import Recipe

Rows = list[tuple[str, str]]

_Values = Sequence[tuple[str, object]]

_SELECTION = {"selection_ratio", "selection_scope", "selection_warmup_epochs", "selection_options"}
_SELECTION |= {"selection_rescore_every", "mask_false_negatives"}
_OBJECTIVE = {
    "gsc": "Soft labels (GSC)",
    "rince": "Robust loss (RINCE)",
    "symnce": "Robust loss (SymNCE)",
    "noisy_channel": "Weights of the noisy channel",
    "division": "Weights of NCR's division",
    "repair": "Repair of mismatched pairs",
    "grad_cache_chunk_size": "GradCache: pairs a pass",
}
_FIGURES = {
    "kept_share": "Candidates that trained",
    "loaded_share": "Candidates that were loaded",
    "scored_share": "Candidates that were scored",
    "visits_kept": "Earlier visits of a pair that trained, on average",
    "estimated_mismatched": "Mismatched pairs, as the run estimates",
}
# None of these changes the model: how often to log, save and evaluate, with how many processes, and where to.
_HOUSEKEEPING = re.compile(
    "(logging|log|save|eval|hub|push|report|disable|dataloader_num|load_best|metric_for|per_device_eval|run|project"
    "|trackio|use_cpu|seed|data_seed|record|scoring_batch|torch_compile|(?!weight_|balance_).*_column|skip_memory|greater_is|do_"
    "|restore|enable_jit|ddp|fsdp|deepspeed|accelerator|include|prediction|batch_eval|max_bad|local_rank|debug).*"
)
_NOISE = {
    "noise_candidates": "Mismatched among the candidates",
    "noise_kept": "Mismatched among the kept pairs",
    "noise_kept_last_epoch": "Mismatched among the kept pairs, last epoch",
    "ranking_auroc_last_epoch": "AUROC of the selection rule, last epoch",
    "label_auroc": "AUROC of the soft labels",
    "p_clean_auroc": "AUROC of the mixture's posterior",
    "evidence_auroc": "AUROC of the evidence of the noisy channel",
}
_DETECTION = "noise_detection_"


def tabulate_data(metrics: Mapping[str, Any], recipe: "Recipe | None") -> Rows:
    """Tabulate the pairs that the model was trained on, and the noise that was put into them."""
    rows = [] if recipe is None else _tabulate_source(recipe)
    bad = as_mapping(metrics.get("bad_rows")).get("count")
    shards = list_skipped_shards(metrics)
    counts = ", ".join(f"{part.get('count')}" + f" ({split})" * (split != "train") for split, part in shards.items())
    return format_rows(
        [
            *rows,
            ("Training pairs", _format_count(metrics.get("num_pairs"))),
            ("Unreadable rows skipped", bad or None),
            ("Shards not read to their end", counts or None),
        ]
    )


def _tabulate_source(recipe: "Recipe") -> list[tuple[str, object]]:
    data = recipe.data
    name = hub_dataset(data.source, data.path)
    scenes = data.source == "scenes"
    noise = describe_noise(data.noise_kind, data.noise_rate, data.noise_seed, data.noise_permutation)
    return [
        ("Data", name or DATA_NAMES[data.source]),
        ("Configuration", data.name if name else None),
        ("Split", None if scenes else data.train_split),
        ("Scenes", f"{data.scenes_image_size} pixels wide, seed {data.scenes_seed}" if scenes else None),
        ("Styles", data.scenes_tasks if scenes and data.scenes_tasks > 1 else None),
        ("Column of the tasks", data.task_column),
        ("Rows used", f"the first {data.max_train_rows:,}" if data.max_train_rows else None),
        ("Images", "stored features" if data.image_features else None),
        ("Injected noise", noise),
    ]


def list_selection(metrics: Mapping[str, Any], recipe: "Recipe | None") -> list[tuple[str, object]]:
    """Return the selection, the objective and the frozen tower of a run, for `tabulate_training`."""
    settings = as_mapping(metrics.get("settings"))
    selection = {"strategy": metrics.get("strategy")}
    selection |= {key.removeprefix("selection_"): value for key, value in settings.items() if key in _SELECTION}
    figures = as_mapping(metrics.get("selection"))
    return [
        *((f"Selection: {key}", value) for key, value in selection.items()),
        ("Reference model", metrics.get("reference")),
        *((name, _format_figure(key, figures.get(key))) for key, name in _FIGURES.items()),
        *((name, "yes" if settings.get(key) == {} else settings.get(key)) for key, name in _OBJECTIVE.items()),
        ("Frozen tower", None if recipe is None else recipe.model.freeze),
    ]


def list_distillation(metrics: Mapping[str, Any], dataset: str | None) -> list[tuple[str, object]]:
    """Return the data, the weights of the terms and the rows of a distillation, for `tabulate_training`."""
    rows = as_mapping(metrics.get("rows"))
    weights = as_mapping(metrics.get("term_weights"))
    measured = {when: as_mapping(part) for when, part in as_mapping(metrics.get("information")).items()}
    return [
        ("Data", dataset),
        ("Method chosen by a pilot", measured.get("choice", {}).get("sentence")),
        ("What the teacher knew before training", measured.get("before", {}).get("sentence")),
        ("What it knows after training", measured.get("after", {}).get("sentence")),
        *((f"Weight of {name.replace('_', ' ')}", weight) for name, weight in weights.items() if weight),
        ("Complete training rows", rows.get("complete")),
        ("Rows without a label", rows.get("unlabelled") or None),
        ("Rows without an auxiliary modality", rows.get("student_only") or None),
        ("Rows that could not be used", rows.get("unusable") or None),
    ]


def tabulate_training(metrics: Mapping[str, Any], recipe: "RecipeFile | None", method: _Values) -> Rows:
    """Tabulate a training: the recipe, the method, length and cost; whatever the run did not record is left out.

    Args:
        metrics: content of the run's `metrics.json`.
        recipe: recipe of the run, if it has one.
        method: names and values that describe the method, see `list_selection` and `list_distillation`.
    """
    return format_rows(
        [
            ("Recipe", None if recipe is None else recipe.name),
            *method,
            ("Optimiser steps", _format_count(metrics.get("steps"))),
            ("Final weights", describe_averaging(metrics)),
            ("Seed", metrics.get("seed")),
            ("Wall-clock", _format_figure("total_s", as_mapping(metrics.get("times")).get("total_s"))),
            ("Time for scoring", _format_figure("scoring_share", collect_run_figures(metrics)["scoring_share"])),
        ]
    )


def tabulate_adapter(adapter: Mapping[str, Any]) -> Rows:
    """Tabulate type, settings and size of an adapter as `describe_adapter` returns them; empty without an adapter."""
    if not adapter:
        return []
    kind = "MoLA, mixture of low-rank adapters" if adapter["type"] == "mola" else adapter["type"]
    settings = [(f"Adapter: {key}", value) for key, value in as_mapping(adapter.get("settings")).items()]
    return format_rows(
        [("Adapter", kind), *settings, ("Trained parameters", _format_count(adapter.get("trained_parameters", 0)))]
    )


def tabulate_hyperparameters(metrics: Mapping[str, Any]) -> Rows:
    """Tabulate the settings that differ from their defaults and are not in another table."""
    shown = {"selection_strategy", *_SELECTION, *_OBJECTIVE}
    settings = as_mapping(metrics.get("settings")).items()
    return format_rows([(key, value) for key, value in settings if key not in shown and not _HOUSEKEEPING.match(key)])


def tabulate_results(metrics: Mapping[str, Any]) -> Rows:
    """Tabulate the final figures except those of the noise, the most asked for first."""
    figures = {key: value for key, value in select_final_figures(metrics).items() if not key.startswith(_DETECTION)}
    table = results_table([("", figures)], corner="")
    return format_rows(
        [(name, cell.text + cell.spread) for name, cell in zip(table.columns, table.rows[0], strict=True)]
    )


def tabulate_noise(metrics: Mapping[str, Any]) -> Rows:
    """Tabulate how well the run separated matched from mismatched pairs; no rows if the truth is not known."""
    selection, final = as_mapping(metrics.get("selection")), select_final_figures(metrics)
    rows = [(name, _format_figure(key, selection.get(key))) for key, name in _NOISE.items()]
    for key, value in final.items():
        if key.startswith(_DETECTION):
            name = key.removeprefix(_DETECTION).replace("auroc", "AUROC").replace("_", " ")
            rows.append((f"Final scores: {name}", _format_figure(key, value)))
    if (count := metrics.get("scored_train_pairs")) is not None:
        # The pairs of a stream have no number, and the first of them are taken.
        sample = "a random sample of" if metrics.get("num_pairs") is not None else "the first"
        rows.append(("Final scores rest on", f"{sample} {count:,} training pairs"))
    return format_rows(rows)


def format_rows(rows: _Values) -> Rows:
    """Return as text the rows whose name and value may be published, without those that have no value."""
    known = [(name, value) for name, value in rows if value is not None and value != {} and value != []]
    shown = [(name, value) for name, value in known if may_be_published(name) and may_be_published(value)]
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str)) for name, value in shown]


def _format_figure(key: str, value: object) -> str | None:
    # The figures of the last epoch have the unit of the whole run's.
    return None if value is None else format_number(value, key.removesuffix("_last_epoch"))


def _format_count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
