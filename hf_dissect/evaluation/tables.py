"""Prints results of several runs beside each other, with their spread, in a terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

MISSING = "-"


def summarise_seeds(runs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float | None]]:
    """Mean and spread of each figure over runs that differ in their seed only.

    Args:
        runs: One flat mapping of figures per run. What is no number (text, nested mappings) is left out; None is a
            figure that a run could not compute, and NaN, which makes the mean NaN, one that it computed as NaN.

    Returns:
        For each figure `{"mean", "std"}`: mean and sample standard deviation (divisor n - 1) of the runs that have it;
        `std` is None where only one has it, and both are None where all hold None.
    """
    summary = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        numbers = [float(value) for value in values if _is_number(value)]
        if numbers:
            summary[name] = {"mean": statistics.fmean(numbers), "std": _sample_deviation(numbers)}
        elif all(value is None for value in values):
            summary[name] = {"mean": None, "std": None}
    return summary


def format_results_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] | Mapping[str, str],
    decimals: int | Mapping[str, int] = 2,
) -> str:
    """Lays rows out as a plain text table: text to the left, numbers to the right, a rule under the headings.

    Args:
        rows: One mapping per line. A value is text, a number, a (mean, std) tuple, a `{"mean", "std"}` mapping (both
            printed as `mean ± std`, without the spread where it is None), or None. None and absent keys print as `-`.
        columns: Keys to print, in order; a mapping gives each its heading.
        decimals: Digits after the point of what is no integer, for all columns or by key (2 where not named).

    Returns:
        The table, without a newline at its end.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    printed = []
    for key, heading in headings.items():
        digits = decimals.get(key, 2) if isinstance(decimals, Mapping) else decimals
        values = [row.get(key) for row in rows]
        cells = [heading, *(_cell(value, digits) for value in values)]
        width = max(map(len, cells))
        is_text = any(isinstance(value, str) for value in values)
        printed.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*printed, strict=True)]
    rule = "  ".join("-" * len(column[0]) for column in printed)
    return "\n".join([*lines[:1], rule, *lines[1:]])


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _sample_deviation(numbers: list[float]) -> float | None:
    if len(numbers) < 2:
        return None
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return statistics.stdev(numbers)


def _cell(value: object, decimals: int) -> str:
    if isinstance(value, Mapping):
        value = (value["mean"], value.get("std"))
    if isinstance(value, tuple):
        mean, spread = value
        shown = _cell(mean, decimals)
        return shown if mean is None or spread is None else f"{shown} ± {_cell(spread, decimals)}"
    if value is None:
        return MISSING
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return f"{value:.{decimals}f}" if is_fraction else str(value)
