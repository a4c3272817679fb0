"""Tables of the reports: the figures of a row, the titles of the columns and the digits of the numbers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_dissect.report.plots import to_finite

MISSING = "–"
_RECALL = r"(?=.*(?:\b|_)(?:r|recall)@)"
# Columns come in this order, the ones most asked for first. Others, such as median ranks, come last.
_ORDER: tuple[str, ...] = (
    r".*recall_sum",
    rf"{_RECALL}.*image_to_text.*",
    rf"{_RECALL}.*text_to_image.*",
    rf"{_RECALL}.*",
)
_ORDER += (r"noise_kept", r"total_s", r"scoring_share", r".*zero_shot.*", r"label_auroc", r".*noise.*")
_LOWER_IS_BETTER = re.compile(r".*(rank|noise_kept|loss).*|.*_s")
_HIGHER_IS_BETTER = re.compile(r".*(recall|r@|auroc|auc|precision|recognised|accuracy|top_?\d).*")
_SHARE = re.compile(r".*(_share|noise_kept|noise_candidates|noise_rate|estimated_mismatched)|kept_share")
_COUNT = re.compile(r".*_num_.*|repeated_captions|.*_own_ceiling@\d+")
_LABELS = {
    "noise_kept": "Mismatched among kept",
    "kept_share": "Kept share",
    "loaded_share": "Loaded share",
    "scored_share": "Scored share",
    "visits_kept": "Visits of the kept",
    "visits_candidates": "Visits of the candidates",
    "total_s": "Wall-clock",
    "scoring_share": "Time for scoring",
    "label_auroc": "Label AUROC",
    "estimated_mismatched": "Estimated mismatched",
    "noise_detection_auroc": "Noise AUROC",
    "noise_detection_roc_auc": "Noise AUROC",
    "noise_detection_average_precision": "Noise average precision",
}


@dataclass(frozen=True)
class Cell:
    """One figure as text; `best` is True if no row of the column is better."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass
class Table:
    """A table without a caption; `names` are the row headers in its first column, `rows` the cells next to them."""

    columns: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    corner: str = "run"


def describe_problems(rows: Mapping[str, Any]) -> list[str]:
    """Return the problems of rows as people read them, from an entry of `metrics.json` about rows."""
    entries = [entry for entry in rows.get("problems") or [] if isinstance(entry, Mapping)]
    paths = ["" if entry.get("path") is None else f": {entry['path']}" for entry in entries]
    return [f"{entry.get('id')}: {entry.get('problem')}{path}" for entry, path in zip(entries, paths, strict=True)]


def list_skipped_shards(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return `count` and `shards` by split from the entry `skipped_shards` of `metrics.json`."""
    entry = as_mapping(metrics.get("skipped_shards"))
    others = {split: part for split, part in entry.items() if isinstance(part, Mapping) and split != "shards"}
    return {**({"train": entry} if entry.get("count") else {}), **others}


def as_mapping(value: object) -> Mapping:
    """Return `value` if it is a mapping, else an empty one: metrics of an interrupted run hold None in places."""
    return value if isinstance(value, Mapping) else {}


def describe_averaging(metrics: Mapping) -> str | None:
    """Return how many weights the final model of a run is the mean of; None for a model of the last weights."""
    averaged = as_mapping(metrics.get("averaged_weights"))
    if not averaged:
        return None
    return f"mean of {averaged['steps']:,} steps, from step {averaged['first_step']:,} on"


def label(key: str) -> str:
    """Return the column title of a metric, such as `Image→text R@1` for `retrieval_r@1_image_to_text`."""
    if key in _LABELS:
        return _LABELS[key]
    text = re.sub(r"^(retrieval|eval|selection)_", "", key)
    direction = re.search(r"image_to_text|text_to_image", text)
    rest = text.replace(direction[0], "") if direction else text
    rest = re.sub(r"\b(?:r|recall)@", "R@", rest.strip("_").replace("_", " "), flags=re.IGNORECASE).strip()
    if direction:
        return f"{'Image→text' if direction[0].startswith('image') else 'Text→image'} {rest}"
    return rest[:1].upper() + rest[1:]


def choose_number_style(key: str, values: Sequence[float]) -> tuple[float, int, str]:
    """Return factor, decimals and unit for all `values` of the column `key`.

    A key that ends with `_s` means seconds; shares become per cent.
    """
    largest = max((abs(value) for value in values), default=0.0)
    if key.endswith("_s"):
        return (1, 1, " s") if largest < 120 else (1 / 60, 1, " min") if largest < 7200 else (1 / 3600, 2, " h")
    if _SHARE.fullmatch(key):
        return 100, 1, " %"
    if key in ("correlation", "differential"):
        return 1, 2, ""
    if all(value == round(value) for value in values):
        return 1, 0, ""
    return 1, 0 if largest >= 10_000 else 1 if largest >= 100 else 2 if largest >= 10 else 3, ""


def format_number(value: object, key: str = "") -> str:
    """Format one value with the digits and the unit of the metric `key`, or as a dash if it is None or NaN."""
    number = to_finite(value)
    if number is None:
        return MISSING
    factor, decimals, unit = choose_number_style(key, [number])
    return f"{number * factor:,.{decimals}f}{unit}"


def results_table(rows: Sequence[tuple[str, Mapping]], *, corner: str) -> Table:
    """Build a table with a row for each (name, figures) and a column for each key that any row has.

    Args:
        rows: names and figures; a figure is a number or `{"mean", "std"}`.
        corner: title of the column of names.
    """
    keys = list(dict.fromkeys(key for _, figures in rows for key in figures))
    keys = [key for key in keys if any(_read_mean(figures.get(key)) is not None for _, figures in rows)]
    keys.sort(key=_find_rank)
    columns = [_build_column(key, [figures.get(key) for _, figures in rows]) for key in keys]
    cells = [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in rows]
    return Table([label(key) for key in keys], [name for name, _ in rows], cells, corner)


def select_final_figures(metrics: Mapping) -> dict[str, Any]:
    """Return the final figures of one run without the counts that they rest on, and what bounds them."""
    final = {str(key): value for key, value in as_mapping(metrics.get("final")).items()}
    return {key: value for key, value in final.items() if not _COUNT.fullmatch(key)}


def collect_run_figures(metrics: Mapping) -> dict[str, Any]:
    """Return the row of one run in the results table, from the content of its `metrics.json`."""
    times, selection = as_mapping(metrics.get("times")), as_mapping(metrics.get("selection"))
    total, scoring = to_finite(times.get("total_s")), to_finite(times.get("scoring_s"))
    return {
        **select_final_figures(metrics),
        "noise_kept": selection.get("noise_kept"),
        "label_auroc": find_label_auroc(selection),
        "estimated_mismatched": selection.get("estimated_mismatched"),
        "total_s": total,
        "scoring_share": scoring / total if total and scoring is not None else None,
    }


def find_label_auroc(selection: Mapping) -> Any:
    """Return the AUROC of a run's last opinion of its pairs: soft labels, a division, or evidence."""
    known = (selection.get(f"{name}_auroc") for name in ("label", "p_clean", "evidence"))
    return next((value for value in known if value is not None), None)


def compare_settings(names: Sequence[str], settings: Sequence[object], *, corner: str) -> tuple[Table, Table]:
    """Build two tables: the settings that are equal in all runs, and those that differ.

    Args:
        names: names of the runs.
        settings: settings of each run, nested as they are; their keys are joined by dots.
        corner: title of the column of keys.
    """
    flat = [_flatten(as_mapping(values)) for values in settings]
    equal, different = Table(["value"], corner=corner), Table(list(names), corner=corner)
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [run.get(key, MISSING) for run in flat]
        table, shown = (equal, values[:1]) if len(set(values)) == 1 else (different, values)
        table.names.append(key)
        table.rows.append([Cell(value) for value in shown])
    return equal, different


def _read_mean(value: object) -> float | None:
    return to_finite(value.get("mean")) if isinstance(value, Mapping) else to_finite(value)


def _find_rank(key: str) -> int:
    return next((i for i, pattern in enumerate(_ORDER) if re.fullmatch(pattern, key, re.IGNORECASE)), len(_ORDER))


def _build_column(key: str, values: Sequence[object]) -> list[Cell]:
    means = [_read_mean(value) for value in values]
    known = [mean for mean in means if mean is not None]
    stds = [to_finite(value.get("std")) if isinstance(value, Mapping) else None for value in values]
    factor, decimals, unit = choose_number_style(key, known + [std for std in stds if std is not None])
    pick = min if _LOWER_IS_BETTER.fullmatch(key.lower()) else max
    judged = pick is min or _HIGHER_IS_BETTER.fullmatch(key.lower())
    texts = [None if mean is None else f"{mean * factor:,.{decimals}f}" for mean in means]
    # Rows that show the same digits are equally good to the reader, and a column of equals has no best.
    best = texts[means.index(pick(known))] if judged and len(set(texts) - {None}) > 1 else None
    cells = []
    for text, std in zip(texts, stds, strict=True):
        spread = f" ± {std * factor:,.{decimals}f}" if std is not None else ""
        cells.append(Cell(MISSING) if text is None else Cell(text, spread + unit, text == best))
    return cells


def _flatten(values: Mapping, prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result.update(_flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return result
