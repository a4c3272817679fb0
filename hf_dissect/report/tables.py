"""Tables of the run report: which figures stand in a row, what their columns are called, how many digits they get."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_dissect.report.plots import finite

MISSING = "–"
_RECALL = r"(?=.*(?:\b|_)(?:r|recall)@)"
# Columns come in this order, the ones most asked for first; what matches nothing (median ranks) comes last.
_ORDER = (r".*recall_sum", rf"{_RECALL}.*image_to_text.*", rf"{_RECALL}.*text_to_image.*", rf"{_RECALL}.*")
_ORDER += (r"noise_kept", r"total_s", r"scoring_share", r".*zero_shot.*", r"label_auroc", r".*noise.*")
_LOWER_IS_BETTER = re.compile(r".*(rank|noise_kept|loss).*|.*_s")
_HIGHER_IS_BETTER = re.compile(r".*(recall|r@|auroc|auc|precision|recognised|accuracy|top_?\d).*")
_SHARE = re.compile(r".*(_share|noise_kept|noise_candidates|noise_rate)|kept_share")
_LABELS = {
    "noise_kept": "Mismatched among kept",
    "kept_share": "Kept share",
    "total_s": "Wall-clock",
    "scoring_share": "Time for scoring",
    "label_auroc": "Label AUROC",
    "noise_detection_auroc": "Noise AUROC",
    "noise_detection_roc_auc": "Noise AUROC",
    "noise_detection_average_precision": "Noise average precision",
}


@dataclass(frozen=True)
class Cell:
    """One figure as text; `best` where no row of the column is better."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass
class Table:
    """A caption-less table: the first column holds row headers (`names`), `rows` the cells beside them."""

    columns: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    corner: str = "run"


def mapping(value: object) -> Mapping:
    """`value` if it is a mapping, otherwise an empty one: metrics of an interrupted run hold None in places."""
    return value if isinstance(value, Mapping) else {}


def label(key: str) -> str:
    """The column title of a metric, such as `Image→text R@1` for `retrieval_r@1_image_to_text`."""
    if key in _LABELS:
        return _LABELS[key]
    text = re.sub(r"^(retrieval|eval|selection)_", "", key)
    direction = re.search(r"image_to_text|text_to_image", text)
    rest = text.replace(direction[0], "") if direction else text
    rest = re.sub(r"\b(?:r|recall)@", "R@", rest.strip("_").replace("_", " "), flags=re.IGNORECASE).strip()
    if direction:
        return f"{'Image→text' if direction[0].startswith('image') else 'Text→image'} {rest}"
    return rest[:1].upper() + rest[1:]


def number_style(key: str, values: Sequence[float]) -> tuple[float, int, str]:
    """Factor, decimals and unit for all `values` of the column `key`; seconds end on `_s`, shares become per cent."""
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
    """`value` alone, in the digits and unit of the metric `key`; a dash for None and NaN."""
    number = finite(value)
    if number is None:
        return MISSING
    factor, decimals, unit = number_style(key, [number])
    return f"{number * factor:,.{decimals}f}{unit}"


def results_table(rows: Sequence[tuple[str, Mapping]], *, corner: str) -> Table:
    """One row per (name, figures), each figure a number or `{"mean", "std"}`; columns are the union of the keys."""
    keys = list(dict.fromkeys(key for _, figures in rows for key in figures))
    keys = [key for key in keys if any(_mean(figures.get(key)) is not None for _, figures in rows)]
    keys.sort(key=_rank)
    columns = [_column(key, [figures.get(key) for _, figures in rows]) for key in keys]
    cells = [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in rows]
    return Table([label(key) for key in keys], [name for name, _ in rows], cells, corner)


def final_figures(metrics: Mapping) -> dict:
    """The final figures of one run without the counts that they rest on."""
    return {str(key): value for key, value in mapping(metrics.get("final")).items() if "_num_" not in str(key)}


def run_figures(metrics: Mapping) -> dict:
    """The row of one run in the results table, out of its `metrics.json`."""
    times, selection = mapping(metrics.get("times")), mapping(metrics.get("selection"))
    total, scoring = finite(times.get("total_s")), finite(times.get("scoring_s"))
    return {
        **final_figures(metrics),
        "noise_kept": selection.get("noise_kept"),
        "label_auroc": selection.get("label_auroc", selection.get("p_clean_auroc")),
        "total_s": total,
        "scoring_share": scoring / total if total and scoring is not None else None,
    }


def settings_tables(names: Sequence[str], settings: Sequence[object], *, corner: str) -> tuple[Table, Table]:
    """Settings of several runs as (those equal in all runs, those that differ); nested keys are joined by dots."""
    flat = [_flat(mapping(values)) for values in settings]
    equal, different = Table(["value"], corner=corner), Table(list(names), corner=corner)
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [run.get(key, MISSING) for run in flat]
        table, shown = (equal, values[:1]) if len(set(values)) == 1 else (different, values)
        table.names.append(key)
        table.rows.append([Cell(value) for value in shown])
    return equal, different


def _mean(value: object) -> float | None:
    return finite(value.get("mean")) if isinstance(value, Mapping) else finite(value)


def _rank(key: str) -> int:
    return next((i for i, pattern in enumerate(_ORDER) if re.fullmatch(pattern, key, re.IGNORECASE)), len(_ORDER))


def _column(key: str, values: Sequence[object]) -> list[Cell]:
    means = [_mean(value) for value in values]
    known = [mean for mean in means if mean is not None]
    stds = [finite(value.get("std")) if isinstance(value, Mapping) else None for value in values]
    factor, decimals, unit = number_style(key, known + [std for std in stds if std is not None])
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


def _flat(values: Mapping, prefix: str = "") -> dict[str, str]:
    result = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return result
