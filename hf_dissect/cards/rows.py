"""Rows of the tables in a card: data, selection, objective, adapter, hyper-parameters, results and noise."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_dissect.cards.metadata import DATA_NAMES
from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.report.tables import (
    select_final_figures,
    format_number,
    as_mapping,
    results_table,
    collect_run_figures,
)

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

Rows = list[tuple[str, str]]

_SELECTION = {"selection_ratio", "selection_scope", "selection_warmup_epochs", "selection_options"}
_SELECTION |= {"mask_false_negatives"}
_OBJECTIVE = {"gsc": "Soft labels (GSC)", "grad_cache_chunk_size": "GradCache: pairs a pass"}
# Neither makes another model: how often is logged, saved and evaluated, by how many processes, and where to.
_HOUSEKEEPING = re.compile(
    "(logging|log|save|eval|hub|push|report|disable|dataloader_num|load_best|metric_for|per_device_eval|run|project"
    "|trackio|use_cpu|seed|data_seed|record|scoring_batch|torch_compile|.*_column|skip_memory|greater_is|do_"
    "|restore|enable_jit|ddp|fsdp|deepspeed|accelerator|include|prediction|batch_eval|max_bad|local_rank|debug).*"
)
_NOISE = {
    "noise_candidates": "Mismatched among the candidates",
    "noise_kept": "Mismatched among the kept pairs",
    "noise_kept_last_epoch": "Mismatched among the kept pairs, last epoch",
    "ranking_auroc_last_epoch": "AUROC of the selection rule, last epoch",
    "label_auroc": "AUROC of the soft labels",
    "p_clean_auroc": "AUROC of the mixture's posterior",
}
_DETECTION = "noise_detection_"


def data_rows(metrics: Mapping, recipe: "Recipe | None") -> Rows:
    """What the model was trained on, and the noise that was put into it."""
    rows = [] if recipe is None else _source_rows(recipe)
    bad = as_mapping(metrics.get("bad_rows")).get("count")
    return told(
        [*rows, ("Training pairs", _count(metrics.get("num_pairs"))), ("Unreadable rows skipped", bad or None)]
    )


def _source_rows(recipe: "Recipe") -> list[tuple[str, object]]:
    data = recipe.data
    name = hub_dataset(data.source, data.path)
    scenes = data.source == "scenes"
    noise = f"{data.noise_rate:.0%} of the training captions shuffled, seed {data.noise_seed}"
    fixed = "training captions in the order of a fixed permutation"
    return [
        ("Data", name or DATA_NAMES[data.source]),
        ("Configuration", data.name if name else None),
        ("Split", None if scenes else data.train_split),
        ("Scenes", f"{data.scenes_image_size} pixels wide, seed {data.scenes_seed}" if scenes else None),
        ("Styles", data.scenes_tasks if scenes and data.scenes_tasks > 1 else None),
        ("Tasks told by the column", data.task_column),
        ("Rows used", f"the first {data.max_train_rows:,}" if data.max_train_rows else None),
        ("Images", "stored features" if data.image_features else None),
        ("Injected noise", fixed if data.noise_permutation else noise if data.noise_rate else None),
    ]


def training_rows(metrics: Mapping, recipe: "Recipe | None") -> Rows:
    """Selection, objective, length and cost of the training; what the run did not record is left out."""
    settings = as_mapping(metrics.get("settings"))
    selection = {"strategy": metrics.get("strategy")}
    selection |= {key.removeprefix("selection_"): value for key, value in settings.items() if key in _SELECTION}
    times, figures = as_mapping(metrics.get("times")), collect_run_figures(metrics)
    kept = as_mapping(metrics.get("selection")).get("kept_share")
    return told(
        [
            ("Recipe", None if recipe is None else recipe.name),
            *((f"Selection: {key}", value) for key, value in selection.items()),
            ("Candidates that trained", _figure("kept_share", kept)),
            *((name, settings.get(key)) for key, name in _OBJECTIVE.items()),
            ("Frozen tower", None if recipe is None else recipe.model.freeze),
            ("Optimiser steps", _count(metrics.get("steps"))),
            ("Seed", metrics.get("seed")),
            ("Wall-clock", _figure("total_s", times.get("total_s"))),
            ("Time for scoring", _figure("scoring_share", figures["scoring_share"])),
        ]
    )


def adapter_rows(adapter: Mapping) -> Rows:
    """Type, settings and size of an adapter as `describe_adapter` tells them; none without one."""
    if not adapter:
        return []
    kind = "MoLA, mixture of low-rank adapters" if adapter["type"] == "mola" else adapter["type"]
    settings = [(f"Adapter: {key}", value) for key, value in as_mapping(adapter.get("settings")).items()]
    return told([("Adapter", kind), *settings, ("Trained parameters", _count(adapter.get("trained_parameters", 0)))])


def hyperparameter_rows(metrics: Mapping) -> Rows:
    """Settings of the training that differ from their defaults and are in no other table."""
    shown = {"selection_strategy", *_SELECTION, *_OBJECTIVE}
    settings = as_mapping(metrics.get("settings")).items()
    return told([(key, value) for key, value in settings if key not in shown and not _HOUSEKEEPING.match(key)])


def result_rows(metrics: Mapping) -> Rows:
    """The final figures but those of the noise, the most asked for first."""
    figures = {key: value for key, value in select_final_figures(metrics).items() if not key.startswith(_DETECTION)}
    table = results_table([("", figures)], corner="")
    return told([(name, cell.text + cell.spread) for name, cell in zip(table.columns, table.rows[0], strict=True)])


def noise_rows(metrics: Mapping) -> Rows:
    """What the run found of the mismatched pairs; none where the truth is not known."""
    selection, final = as_mapping(metrics.get("selection")), select_final_figures(metrics)
    rows = [(name, _figure(key, selection.get(key))) for key, name in _NOISE.items()]
    for key, value in final.items():
        if key.startswith(_DETECTION):
            name = key.removeprefix(_DETECTION).replace("auroc", "AUROC").replace("_", " ")
            rows.append((f"Final scores: {name}", _figure(key, value)))
    return told(rows)


def told(rows: list[tuple[str, object]]) -> Rows:
    """The rows that have a value which may be published, as text."""
    known = [(name, value) for name, value in rows if value is not None and value != {} and value != []]
    shown = [(name, value) for name, value in known if may_be_published(name) and may_be_published(value)]
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str)) for name, value in shown]


def _figure(key: str, value: object) -> str | None:
    # What is a share in the first epochs is one in the last.
    return None if value is None else format_number(value, key.removesuffix("_last_epoch"))


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
