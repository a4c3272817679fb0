"""Report of one or several runs as one HTML file that needs nothing else: no network, no script, no model."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_dissect.report.data import MAX_SAMPLES, PairSample, RunSummary, replace_file, thumbnail
from hf_dissect.report.plots import (
    DASHES,
    DROPPED,
    INK,
    KEPT,
    NUM_COLORS,
    Curve,
    finite,
    histogram_panel,
    histogram_problem,
    line_panel,
    mean_series,
    series,
)
from hf_dissect.report.tables import (
    Table,
    format_number,
    mapping,
    results_table,
    run_figures,
    settings_tables,
)
from hf_dissect.version import __version__

__all__ = ["PairSample", "RunSummary", "write_report"]

MAX_BAD_IDS = 20
MAX_CAPTION = 400
TIME_PARTS = ("data", "scoring", "training", "evaluation")

# (logged key, axis label, whether it is a share)
_LOSS = (("loss", "training loss", False), ("eval_loss", "evaluation loss", False))
_RETRIEVAL = (
    (r"eval_.*recall_sum", "recall sum", False),
    (r"eval_.*(image_to_text_r@1|r@1_image_to_text)", "image→text R@1", False),
    (r"eval_.*(text_to_image_r@1|r@1_text_to_image)", "text→image R@1", False),
)
_NOISE = (("selection_noise_kept", "mismatched among kept", True),)
_NOISE_REFERENCE = "selection_noise_candidates"

_Groups = Sequence[tuple[str, Sequence[RunSummary]]]


def write_report(
    path: str | os.PathLike, runs: Sequence[RunSummary], *, title: str, table: list[dict] | None = None
) -> Path:
    """Write the report of `runs` to `path` as one HTML file, and return the path.

    Args:
        path: the HTML file; it is replaced only once the new one is complete.
        runs: one or more runs; their curves are laid over each other. Whatever a run lacks is said in its section.
        title: heading of the page.
        table: rows of a comparison, `{"strategy", "seeds", "<metric>": {"mean", "std"} or a number}`. Without it, the
            results table has one row per run.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = format_number
    names = [run.name for run in runs]
    groups = _groups(runs)
    uids = map("f{}".format, itertools.count())
    page = environment.get_template("run.html.jinja").render(
        title=title,
        version=__version__,
        facts=_facts(runs),
        results=_results(runs, table),
        loss=_panels(groups, _LOSS, uids),
        retrieval=_panels(groups, _RETRIEVAL, uids),
        noise=_panels(groups, _NOISE, uids, reference=_NOISE_REFERENCE),
        has_final=any(mapping(run.metrics.get("final")) for run in runs),
        sheets=[_sheet(run, uids) for run in runs],
        open_sheet=next((i for i, run in enumerate(runs) if run.worst_dropped), 0),
        time_parts=(*TIME_PARTS, "other"),
        times=_times(runs),
        settings=settings_tables(names, [run.metrics.get("settings") for run in runs], corner="setting"),
        versions=settings_tables(names, [run.metrics.get("versions") for run in runs], corner="package"),
        bad_rows=[_bad_rows(run) for run in runs],
    )
    return replace_file(path, page)


@dataclass
class _Panels:
    figures: list[Markup] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names of the runs that logged none of the section's keys."""
    legend: list[dict] = field(default_factory=list)
    """Name, colour index, SVG dash array and number of seeds of each curve."""
    reference: bool = False


def _groups(runs: Sequence[RunSummary]) -> _Groups:
    """Runs that differ in the seed alone, in order of appearance."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(re.sub(r",? seed \S+$", "", run.name), []).append(run)
    return list(groups.items())


def _panels(groups: _Groups, panels: Sequence, uids: Iterator[str], reference: str | None = None) -> _Panels:
    """One figure for each of `panels` that any run logged; `reference` is a key drawn as one dashed grey mean line."""
    drawn, seen = [], set()
    for pattern, ylabel, percent in panels:
        curves, ends = [], []
        for index, (name, group) in enumerate(groups):
            points = [series(run.log_history or [], pattern) for run in group]
            seen |= {id(run) for run, (x, _) in zip(group, points, strict=True) if x}
            group_curves = _group_curves([point for point in points if point[0]], index)
            curves += group_curves
            ends += [f"{name} ends at {group_curves[-1].y[-1]:.4g}"] if group_curves else []
        if curves:
            drawn.append((curves, ylabel, percent, ends))
    result = _Panels(missing=[run.name for _, group in groups for run in group if id(run) not in seen])
    for index, (name, group) in enumerate(groups):
        dashes = " ".join(str(2 * length) for length in DASHES[index % len(DASHES)])
        seeds = sum(id(run) in seen for run in group)
        result.legend += [{"name": name, "color": index % NUM_COLORS, "dashes": dashes, "seeds": seeds}] * (seeds > 0)
    for curves, ylabel, percent, ends in drawn:
        if reference:
            points = [series(run.log_history or [], reference) for _, group in groups for run in group]
            mean = mean_series([point for point in points if point[0]])
            result.reference = bool(mean[0])
            curves += [Curve(*mean, color=INK, dashes=(5, 2))] if mean[0] else []
        alt = f"{ylabel[0].upper()}{ylabel[1:]} over optimiser steps: {'; '.join(ends)}."
        result.figures.append(
            line_panel(curves, uid=next(uids), ylabel=ylabel, alt=alt, columns=len(drawn), percent=percent)
        )
    return result


def _group_curves(points: Sequence, index: int) -> list[Curve]:
    """A single run as one line; several seeds as thin lines under their mean, which comes last."""
    style = {"color": index, "dashes": DASHES[index % len(DASHES)]}
    mean = mean_series(points) if len(points) > 1 else ([], [])
    curves = [Curve(*point, **style, thin=bool(mean[0])) for point in points]
    return curves + ([Curve(*mean, **style)] if mean[0] else [])


def _sheet(run: RunSummary, uids: Iterator[str]) -> dict:
    """Score distribution and sample pictures of one run."""
    problem = histogram_problem(run.score_histogram)
    over_time = [
        Curve(*points, color=color, dashes=dashes)
        for key, color, dashes in (("kept", KEPT, ()), ("dropped", DROPPED, (4, 1.5)))
        if (points := series(run.log_history or [], f"selection_correlation_{key}"))[0]
    ]
    columns = 1 if problem or not over_time else 2
    figures = []
    if not problem:
        counts = {name: sum(run.score_histogram[name]) for name in ("kept", "dropped")}
        alt = "Candidates by correlation: {kept:,.0f} kept and {dropped:,.0f} dropped.".format(**counts)
        figures.append(histogram_panel(run.score_histogram, uid=next(uids), alt=alt, columns=columns))
    if over_time:
        alt = "Mean correlation of kept and dropped candidates over optimiser steps."
        figures.append(line_panel(over_time, uid=next(uids), ylabel="mean correlation", alt=alt, columns=columns))
    samples = [("Best kept", run.best_kept), ("Worst dropped", run.worst_dropped)]
    return {
        "name": run.name,
        "figures": figures,
        "problem": problem,
        "samples": [
            (heading, [_card(sample) for sample in (pairs or [])[:MAX_SAMPLES]]) for heading, pairs in samples
        ],
    }


def _card(sample: PairSample) -> dict:
    caption = str(sample.caption)
    return {
        "sample_id": sample.sample_id,
        "caption": caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION] + "…",
        "correlation": sample.correlation,
        "differential": sample.differential,
        "is_clean": sample.is_clean,
        "picture": thumbnail(sample.image),
        "tiny": sample.image is not None and max(sample.image.size) <= 64,
    }


def _results(runs: Sequence[RunSummary], table: list[dict] | None) -> Table:
    if table is None:
        return results_table([(run.name, run_figures(run.metrics)) for run in runs], corner="run")
    rows = []
    for row in table:
        figures = {str(key): value for key, value in row.items() if key not in ("strategy", "seeds")}
        seeds = row.get("seeds")
        count = len(seeds) if isinstance(seeds, list | tuple) else 0
        name = f"{row.get('strategy')}" + (f" ({count} seeds)" if count > 1 else "")
        rows.append((name, figures))
    return results_table(rows, corner="strategy")


def _facts(runs: Sequence[RunSummary]) -> list[tuple[str, str]]:
    """The figures a reader asks for first; those that no run has are left out."""

    def span(key: str, values: Sequence[object]) -> str:
        known = sorted(number for number in map(finite, values) if number is not None)
        shown = [format_number(number, key) for number in known[:1] + known[-1:]]
        return " to ".join(dict.fromkeys(shown))

    metrics = [run.metrics for run in runs]
    selection = [mapping(values.get("selection")) for values in metrics]
    times = [finite(mapping(values.get("times")).get("total_s")) for values in metrics]
    candidates = [series(run.log_history or [], _NOISE_REFERENCE)[1] for run in runs]
    facts = [
        (
            "Strategy",
            ", ".join(dict.fromkeys(str(values["strategy"]) for values in metrics if values.get("strategy"))),
        ),
        ("Runs", str(len(runs)) if len(runs) > 1 else ""),
        ("Pairs", span("num_pairs", [values.get("num_pairs") for values in metrics])),
        ("Optimiser steps", span("steps", [values.get("steps") for values in metrics])),
        ("Kept of the candidates", span("kept_share", [values.get("kept_share") for values in selection])),
        ("Mismatched among kept", span("noise_kept", [values.get("noise_kept") for values in selection])),
        (
            "Mismatched among candidates",
            span("noise_candidates", [sum(values) / len(values) for values in candidates if values]),
        ),
        (
            "Wall-clock, all runs" if len(runs) > 1 else "Wall-clock",
            span("total_s", [sum(time for time in times if time is not None)] if any(times) else []),
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _times(runs: Sequence[RunSummary]) -> list[dict]:
    """Seconds per part and the width of its bar in per cent of the longest run; a run without times has no parts."""
    rows = []
    for run in runs:
        times = mapping(run.metrics.get("times"))
        parts = {part: max(finite(times.get(f"{part}_s")) or 0.0, 0.0) for part in TIME_PARTS}
        total = max(finite(times.get("total_s")) or 0.0, sum(parts.values()))
        rows.append({"name": run.name, "total": total, "parts": {**parts, "other": total - sum(parts.values())}})
    longest = max((row["total"] for row in rows), default=0.0)
    for row in rows:
        row["widths"] = {name: 100 * value / longest for name, value in row["parts"].items()} if longest else {}
    return rows


def _bad_rows(run: RunSummary) -> dict:
    bad = mapping(run.metrics.get("bad_rows"))
    ids = list(bad.get("ids") or [])
    return {
        "name": run.name,
        "count": bad.get("count"),
        "reasons": mapping(bad.get("reasons")),
        "ids": ids[:MAX_BAD_IDS],
        "more_ids": len(ids) > MAX_BAD_IDS,
    }
