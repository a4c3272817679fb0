"""Text tables of figures for a terminal: of one run, or of several runs with mean and spread."""

import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

MISSING = "-"
_NAMES = {
    "recall_sum": "recall sum",
    "zero_shot_accuracy@1": "zero-shot top-1 accuracy",
    "zero_shot_accuracy@5": "zero-shot top-5 accuracy",
    "noise_detection_auroc": "noise detection AUROC",
    "noise_detection_average_precision": "noise detection average precision",
}


def summarise_seeds(runs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float | None]]:
    """Compute mean and spread of each figure over runs that differ in nothing but their seed.

    Args:
        runs: Flat mappings of figures, one for each run. Text and nested mappings are left out. None stands for a
            figure that the run could not compute; a NaN makes the mean NaN.

    Returns:
        For each figure, `mean` and `std`: the mean and the sample standard deviation (divisor n - 1) over the runs
        that have the figure. `std` is None if only one run has it; both are None if all runs hold None.
    """
    summary: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        numbers = [float(value) for value in values if isinstance(value, Real) and not isinstance(value, bool)]
        if numbers:
            summary[name] = {"mean": statistics.fmean(numbers), "std": _compute_deviation(numbers)}
        elif all(value is None for value in values):
            summary[name] = {"mean": None, "std": None}
    return summary


def format_results_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] | Mapping[str, str],
    decimals: int | Mapping[str, int] = 2,
) -> str:
    """Format rows as a plain text table, with text to the left, numbers to the right and a rule under the headings.

    Args:
        rows: Mappings, one for each line. A value is text, a number, a tuple (mean, std), a mapping with `mean` and
            `std`, or None. Mean and spread are printed as `mean ± std`, or as `mean` if std is None; None and absent
            keys are printed as `-`.
        columns: Keys to print, in order, or a mapping from keys to headings.
        decimals: Digits after the point of numbers that are not integers, for all columns or by key (2 by default).

    Returns:
        Table, without a newline at its end.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    printed = []
    for key, heading in headings.items():
        digits = decimals.get(key, 2) if isinstance(decimals, Mapping) else decimals
        values = [row.get(key) for row in rows]
        cells = [heading, *(_format_cell(value, digits) for value in values)]
        width = max(map(len, cells))
        is_text = any(isinstance(value, str) for value in values)
        printed.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*printed, strict=True)]
    rule = "  ".join("-" * len(column[0]) for column in printed)
    return "\n".join([*lines[:1], rule, *lines[1:]])


def format_retrieval(figures: Mapping[str, float]) -> str:
    """Format the figures of one dual encoder, with recalls in per cent, and other figures below them."""
    rows = []
    for name, direction in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
        keys = {f"R@{k}": f"{direction}_R@{k}" for k in (1, 5, 10)} | {"median rank": f"{direction}_median_rank"}
        if f"{direction}_R@1" in figures:
            rows.append({"retrieval": name, **{heading: figures[key] for heading, key in keys.items()}})
    parts = [format_results_table(rows, list(rows[0]), decimals=1)] if rows else []
    if known := {name: figures[key] for key, name in _NAMES.items() if figures.get(key) is not None}:
        width = max(map(len, known))
        parts.append("\n".join(f"{name:{width}}  {value:.4g}" for name, value in known.items()))
    if repeats := describe_repeats(figures):
        parts.append(repeats)
    return "\n\n".join(parts) or "Nothing was evaluated: there is no validation or test split."


def describe_repeats(figures: Mapping[str, Any]) -> str | None:
    """Return a sentence about the captions that several images share, see `count_repeats`; None without any."""
    count = figures.get("repeated_captions")
    if not count:
        return None
    image, text = (figures[f"{direction}_own_ceiling@1"] for direction in ("image_to_text", "text_to_image"))
    return (
        f"{count:,.0f} captions are those of several images, for all of which they count as right. Where only a\n"
        f"pair's own counts, no model can exceed an R@1 of {image:.1f} (image to text) and {text:.1f} (text to image)."
    )


def format_distillation(figures: Mapping[str, float], method: str | None = None) -> str:
    """Format the figures of a distillation, accuracies and R@1 in per cent, as a table with one row.

    Args:
        figures: Figures by name; those that are neither accuracy nor R@1 are left out.
        method: Name of the row; None for a row without a name.
    """
    row = {name: 100 * value for name, value in figures.items() if name.endswith(("_accuracy", "R@1"))}
    if not row:
        return "Nothing was evaluated: there are no validation or test rows."
    named = {} if method is None else {"method": method}
    return format_results_table([{**named, **row}], [*named, *row], decimals=1)


def _compute_deviation(numbers: list[float]) -> float | None:
    if len(numbers) < 2:
        return None
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return statistics.stdev(numbers)


def _format_cell(value: object, decimals: int) -> str:
    if isinstance(value, Mapping):
        value = (value["mean"], value.get("std"))
    if isinstance(value, tuple):
        mean, spread = value
        shown = _format_cell(mean, decimals)
        return shown if mean is None or spread is None else f"{shown} ± {_format_cell(spread, decimals)}"
    if value is None:
        return MISSING
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return f"{value:.{decimals}f}" if is_fraction else str(value)
