"""Comparison of strategies: runs of one recipe with several strategies and seeds, next to each other."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_dissect.evaluation import format_results_table, summarise_seeds
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.report.selection import RunSummary, write_report
from hf_dissect.report.tables import find_label_auroc
from hf_dissect.runs.before_training import check_surroundings
from hf_dissect.runs.output_folder import replace_output_dir
from hf_dissect.runs.run import load_data, run_recipe
from hf_dissect.training.run_folder import write_json

logger = logging.getLogger(__name__)

_COLUMNS = {
    "strategy": "strategy",
    "recall_sum": "recall sum",
    "image_to_text_R@1": "i2t R@1",
    "text_to_image_R@1": "t2i R@1",
    "zero_shot_accuracy@1": "zero-shot",
    "noise_kept": "mismatched kept",
    "estimated_mismatched": "mismatched, estimated",
    "ranking_auroc": "AUROC of rule",
    "label_auroc": "AUROC of labels",
    "noise_detection_auroc": "AUROC of model",
    "steps": "steps",
    "train_s": "seconds",
}
_DECIMALS = {
    "recall_sum": 1,
    "image_to_text_R@1": 1,
    "text_to_image_R@1": 1,
    "zero_shot_accuracy@1": 3,
    "noise_kept": 3,
    "estimated_mismatched": 3,
    "ranking_auroc": 3,
    "label_auroc": 3,
    "noise_detection_auroc": 3,
    "steps": 0,
    "train_s": 0,
}
_LEGEND = (
    "recall sum: R@1 + R@5 + R@10 in both directions on the test split, at most 600.\n"
    "mismatched kept: share of mismatched pairs among the kept ones, last epoch.\n"
    "AUROC of rule: separation of clean from mismatched candidates by the strategy's ranking, last epoch.\n"
    "AUROC of labels: the same for the final soft labels (gsc), the last division (ncr) or the last evidence\n"
    "(noisy_channel), over all pairs that have one.\n"
    "AUROC of model: the same for the correlation under the final weights, over all training pairs.\n"
    "seconds: time for data, scoring and training, without that for evaluation."
)


def compare(
    recipe: Recipe,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    resume: bool = False,
    overwrite: bool | None = None,
    announce: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Run each strategy with each seed, on the same data, for the same number of optimiser steps.

    The runs are written to `<strategy>-seed<n>` in the recipe's `output_dir`, next to `metrics.json` and `report.html`
    of the comparison. These two are written after each run, so an interrupted comparison keeps its results.

    Args:
        recipe: Settings that all runs share.
        strategies: Strategies as `name` or `name:variant`; None for those of the recipe's `compare` section.
        seeds: Seeds of initial weights, order of the data and random choices; None for those of the recipe's
            `compare` section. The data and their noise stay the same.
        resume: True to keep the runs that finished with the same settings instead of running them again.
        overwrite: True to remove what earlier runs left in the folders of these runs; False to refuse to run, with
            `resume`, where a finished run has other settings; None to write over it.
        announce: Function that is called with a line of text before each run.

    Returns:
        The content of `metrics.json`: "name", "table" (a row per strategy, figures as mean and std) and "runs".

    Raises:
        RecipeError: A strategy or seed does not fit the recipe; nothing has run then.
        ValueError: A finished run has other settings, or see `run_recipe`.
    """
    # Settings of the recipe are checked and saved with the comparison.
    given = {"strategies": strategies, "seeds": seeds}
    recipe = recipe.with_overrides(
        [f"compare.{name}={json.dumps(list(values))}" for name, values in given.items() if values is not None]
    )
    strategies, seeds, folder = recipe.compare.strategies, recipe.compare.seeds, Path(recipe.output_dir)
    # The seeds are the outer loop, so that a machine that becomes slower does so for all strategies.
    planned = [(spec, seed, _vary(recipe, spec, seed, folder)) for seed in seeds for spec in strategies]
    if resume and overwrite is False:
        _check_same_settings([variation for _, _, variation in planned])
    check_surroundings(recipe)
    splits = load_data(recipe)
    summaries: list[RunSummary] = []
    comparison: dict[str, Any] = {}
    for number, (spec, seed, variation) in enumerate(planned, 1):
        name = spec if len(seeds) == 1 else f"{spec}, seed {seed}"
        if resume and _is_finished(variation):
            announce(f"[{number}/{len(planned)}] {name}: finished before")
        else:
            announce(f"[{number}/{len(planned)}] {name}")
            run_recipe(variation, splits, name=name, overwrite=bool(overwrite))
        processes = PartialState()
        processes.wait_for_everyone()  # all processes read a file that the first one writes
        summaries.append(RunSummary.load(Path(variation.output_dir) / "report_data.json"))
        summaries[-1].name = name
        comparison = _summarise(recipe, summaries, [part[:2] for part in planned[:number]])
        if processes.is_main_process:
            _write(recipe, folder, summaries, comparison)
    return comparison


def format_comparison(table: Sequence[dict[str, Any]]) -> str:
    """Format the table of a comparison as text, with a legend; columns without any figure are left out."""
    columns = {key: name for key, name in _COLUMNS.items() if any(_has_figure(row.get(key)) for row in table)}
    return f"{format_results_table(table, columns, _DECIMALS)}\n\n{_LEGEND}"


def _vary(recipe: Recipe, spec: str, seed: int, folder: Path) -> Recipe:
    place = folder / f"{spec.replace(':', '-')}-seed{seed}"
    return replace_output_dir(recipe.with_strategy(spec).with_overrides([f"training.seed={seed}"]), place)


def _is_finished(variation: Recipe) -> bool:
    """Check that the folder of a run holds its result and was made with the same settings."""
    folder = Path(variation.output_dir)
    if not (folder / "report_data.json").is_file() or not (folder / "recipe.yaml").is_file():
        return False
    saved, wanted = Recipe.load(folder / "recipe.yaml").to_dict(), variation.to_dict()
    # The section `compare` lists the other runs and does not change this one.
    return saved | {"compare": None} == wanted | {"compare": None}


def _check_same_settings(variations: Sequence[Recipe]) -> None:
    """Raise a ValueError if a run has finished with other settings than it would have now."""
    for variation in variations:
        folder = Path(variation.output_dir)
        if (folder / "report_data.json").is_file() and not _is_finished(variation):
            raise ValueError(
                f"{folder} holds a finished run with other settings, which would be lost; give the settings of that "
                "run, name another folder with --output-dir, or add --overwrite."
            )


def _summarise(recipe: Recipe, summaries: list[RunSummary], done: list[tuple[str, int]]) -> dict[str, Any]:
    runs = [summary.metrics for summary in summaries]
    table = []
    for spec in dict.fromkeys(spec for spec, _ in done):
        own = [(seed, run) for (part, seed), run in zip(done, runs, strict=True) if part == spec]
        figures = summarise_seeds([_flatten_figures(run) for _, run in own])
        table.append({"strategy": spec, "seeds": [seed for seed, _ in own], **figures})
    return {"name": recipe.name, "table": table, "runs": runs}


def _write(recipe: Recipe, folder: Path, summaries: list[RunSummary], comparison: dict[str, Any]) -> None:
    write_json(folder / "metrics.json", comparison)
    recipe.save(folder / "recipe.yaml", command="compare")
    write_report(folder / "report.html", summaries, title=recipe.name, table=comparison["table"])


def _flatten_figures(run: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run that the table may show, flat."""
    times, selection = run["times"], run["selection"]
    return {
        **{
            key: value
            for key, value in run["final"].items()
            if not key.endswith(("_scored", "_unscored", "_mismatched"))
        },
        "noise_kept": selection.get("noise_kept_last_epoch"),
        "estimated_mismatched": selection.get("estimated_mismatched"),
        "noise_kept_whole_run": selection.get("noise_kept"),
        "ranking_auroc": selection.get("ranking_auroc_last_epoch"),
        "label_auroc": find_label_auroc(selection),
        "steps": run["steps"],
        "train_s": times["data_s"] + times["scoring_s"] + times["training_s"],
        "scoring_s": times["scoring_s"],
    }


def _has_figure(value: object) -> bool:
    return value is not None and not (isinstance(value, dict) and value.get("mean") is None)
