"""Heat maps of a MoLA router: the mean weight of each expert for the pairs of each task.

They are tables of the page and not figures, because they show names of the user, which the template escapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dissect.report.plots import to_finite
from hf_dissect.report.tables import MISSING, as_mapping

DEEPEST = 0.5
"""Opacity of the largest weight of a map, over which text can be read on light and on dark pages."""

_DATA = {"test": "test pairs", "validation": "evaluation pairs", "train": "training pairs"}


def show_router_weights(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return what the page shows of the routers, for each run that has one.

    Args:
        runs: Name and content of `metrics.json` of each run.

    Returns:
        For each run `name`, `problem` (a sentence that says why there is no map, or ""), `measured` (a sentence that
        says on what), and `maps`: for each tower its `heading`, `experts` (their number), `rows` with `task`,
        `pairs` and `cells`, and `sentences` about it.
    """
    return [_show_run(name, metrics) for name, metrics in runs if _has_router(metrics)]


def _has_router(metrics: Mapping[str, Any]) -> bool:
    adapter = as_mapping(metrics.get("adapter"))
    is_routed = adapter.get("type") == "mola" and as_mapping(adapter.get("settings")).get("variant") == "router"
    return is_routed or "router_weights" in metrics


def _show_run(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    entry = as_mapping(metrics.get("router_weights"))
    tasks, counts = (value if isinstance(value, list) else [] for value in map(entry.get, ("tasks", "pairs_by_task")))
    shown: dict[str, Any] = {"name": name, "problem": "", "measured": "", "maps": []}
    if not entry:
        shown["problem"] = (
            "The weights were not measured: there were no pairs to measure them on, or the run stopped before its end "
            "or was made by an earlier version."
        )
    elif not entry.get("pairs"):
        shown["problem"] = f"The weights are not known: none of the {_name_data(entry)} could be read."
    elif not as_mapping(entry.get("towers")):
        shown["problem"] = "The weights are not known: the model gave none in its forward pass."
    elif not tasks or len(tasks) != len(counts):
        shown["problem"] = f"The recorded weights are incomplete: {len(tasks)} tasks, {len(counts)} numbers of pairs."
    else:
        shown["measured"] = _describe_data(entry)
        shown["maps"] = [
            _draw_map(tower, as_mapping(figures), tasks, counts) for tower, figures in entry["towers"].items()
        ]
    return shown


def _name_data(entry: Mapping[str, Any]) -> str:
    return _DATA.get(str(entry.get("split")), "pairs")


def _describe_data(entry: Mapping[str, Any]) -> str:
    """Return the sentences on what the weights were measured, and what is left out."""
    pairs, unreadable, total = entry["pairs"], entry.get("unreadable") or 0, entry.get("out_of")
    if total is None:
        part = f"{pairs:,} {_name_data(entry)}, the first of a stream"
    elif total > pairs + unreadable:
        part = f"a random sample of {pairs:,} of {total:,} {_name_data(entry)}"
    else:
        part = f"{pairs:,} {_name_data(entry)}"
    sentences = [f"Measured by the final model on {part}."]
    if unreadable:
        sentences.append(f"{unreadable:,} more could not be read.")
    if entry.get("further_tasks"):
        sentences.append(f"{entry['further_tasks']:,} further tasks with fewer pairs are not shown.")
    if entry.get("tasks") == [None]:
        sentences.append("The pairs have no tasks (data.task_column), so one row shows all of them.")
    return " ".join(sentences)


def _draw_map(tower: str, figures: Mapping[str, Any], tasks: list[Any], counts: list[Any]) -> dict[str, Any]:
    weights = figures.get("weights")
    weights = weights if isinstance(weights, list) else []
    rows = [[to_finite(value) for value in row] if isinstance(row, list) else [] for row in weights]
    experts = max(map(len, rows), default=0)
    heading = f"{tower[:1].upper()}{tower[1:]}" + ("" if tower == "model" else " tower")
    if len(rows) != len(tasks) or not experts or any(len(row) != experts for row in rows):
        problem = "The recorded weights are incomplete: not every task has a weight for every expert."
        return {"heading": heading, "experts": 0, "rows": [], "sentences": [problem]}
    largest = max((value for row in rows for value in row if value is not None), default=0.0)
    drawn = [
        {
            "task": _name_task(task, alone=len(tasks) == 1),
            "pairs": count,
            "cells": [
                {"text": _format_weight(value), "shade": round(DEEPEST * (value or 0.0) / (largest or 1.0), 3)}
                for value in row
            ],
        }
        for task, count, row in zip(tasks, counts, rows, strict=True)
    ]
    broken = [row["task"] for row, values in zip(drawn, rows, strict=True) if row["pairs"] and None in values]
    unseen = [row["task"] for row in drawn if not row["pairs"]]
    sentences = [_describe_distance(figures, sum(count > 0 for count in counts))]
    if broken:
        sentences.append(f"Not known, as a weight was not a finite number: {', '.join(broken)}.")
    if unseen:
        sentences.append(f"Not known, as no pair of the task was measured: {', '.join(unseen)}.")
    return {"heading": heading, "experts": experts, "rows": drawn, "sentences": sentences}


def _name_task(task: Any, alone: bool) -> str:
    if task is None:
        return "all pairs" if alone else "pairs without a task"
    return task if isinstance(task, str) else f"task {task}"


def _format_weight(value: float | None) -> str:
    if value is None:
        return MISSING
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _describe_distance(figures: Mapping[str, Any], num_tasks: int) -> str:
    """Return the sentence that says how far apart the tasks are."""
    if num_tasks < 2:
        return "How far tasks are apart is not known: there are no two of them."
    distance, by_chance = (to_finite(figures.get(name)) for name in ("distance", "distance_by_chance"))
    if distance is None:
        return "How far the tasks are apart is not known: a weight was not a finite number."
    chance = "" if by_chance is None else f" The same pairs with shuffled tasks: {by_chance:.3f}."
    return (
        f"Two tasks are {distance:.3f} apart on average (total-variation distance of their rows: 0 if all tasks are "
        f"alike, 1 if no two share an expert).{chance}"
    )
