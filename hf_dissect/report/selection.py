"""The report of one or several runs with sample selection."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_dissect.report.data import MAX_SAMPLES, PairSample, RunSummary, replace_file, thumbnail
from hf_dissect.report.page import make_legend_entry, render_page
from hf_dissect.report.plots import (
    DASHES,
    DROPPED,
    INK,
    KEPT,
    Curve,
    Points,
    describe_curves,
    draw_curves,
    draw_histogram,
    histogram_problem,
    mean_series,
    series,
    to_finite,
)
from hf_dissect.report.router_weights import show_router_weights
from hf_dissect.report.tables import (
    Table,
    as_mapping,
    collect_run_figures,
    describe_averaging,
    describe_problems,
    format_number,
    list_skipped_shards,
    results_table,
)

__all__ = ["PairSample", "RunSummary", "write_report"]

MAX_BAD_IDS = 20
MAX_CAPTION = 400
TIME_PARTS = ("data", "scoring", "training", "evaluation")

# Pattern of the logged key, axis label, and True for a share of 1.
_LOSS = (("loss", "training loss", False), ("eval_loss", "evaluation loss", False))
_RETRIEVAL = (
    (r"eval_.*recall_sum", "recall sum", False),
    (r"eval_.*(image_to_text_r@1|r@1_image_to_text)", "image→text R@1", False),
    (r"eval_.*(text_to_image_r@1|r@1_text_to_image)", "text→image R@1", False),
)
_NOISE = (
    ("selection_noise_kept", "mismatched among kept", True),
    ("selection_estimated_mismatched", "mismatched, estimated", True),
)
_NOISE_REFERENCE = "selection_noise_candidates"

_Groups = Sequence[tuple[str, Sequence[RunSummary]]]


def write_report(
    path: str | os.PathLike, runs: Sequence[RunSummary], *, title: str, table: list[dict] | None = None
) -> Path:
    """Write the report of `runs` to `path` as one HTML file, and return the path.

    Args:
        path: HTML file; it is replaced only once the new one is complete.
        runs: one or more runs, whose curves are laid over each other. Each section says what a run lacks.
        title: heading of the page.
        table: rows of a comparison, `{"strategy", "seeds", "<metric>": {"mean", "std"} or a number}`. Without it, the
            results table has one row per run.
    """
    return replace_file(path, render_report(runs, title=title, table=table))


def render_report(
    runs: Sequence[RunSummary], *, title: str, table: list[dict] | None = None, live: Mapping[str, Any] | None = None
) -> str:
    """Return the report that `write_report` writes; with `live`, as `render_page` shows it while a run trains."""
    groups = _group_seeds(runs)
    uids = map("f{}".format, itertools.count())
    return render_page(
        "selection.html.jinja",
        title=title,
        live=live,
        facts=_list_facts(runs),
        runs=[(run.name, run.metrics) for run in runs],
        time_parts=TIME_PARTS,
        results=_tabulate_results(runs, table),
        notes=_list_notes(runs),
        loss=_draw_panels(groups, _LOSS, uids),
        retrieval=_draw_panels(groups, _RETRIEVAL, uids),
        noise=_draw_panels(groups, _NOISE, uids, reference=_NOISE_REFERENCE),
        whole_run_noise=_describe_noise(runs),
        samples=_list_samples(runs),
        has_final=any(as_mapping(run.metrics.get("final")) for run in runs),
        sheets=[_draw_sheet(run, uids) for run in runs],
        open_sheet=next((i for i, run in enumerate(runs) if run.worst_dropped), 0),
        routers=show_router_weights([(run.name, run.metrics) for run in runs]),
        bad_rows=[_list_bad_rows(run) for run in runs],
    )


def _list_notes(runs: Sequence[RunSummary]) -> list[str]:
    figures = [final for run in runs if (final := as_mapping(run.metrics.get("final"))).get("repeated_captions")]
    if not figures:
        return []
    from hf_dissect.evaluation.tables import describe_repeats  # which imports torch

    notes = map(describe_repeats, figures)
    return list(dict.fromkeys(note for note in notes if note))


@dataclass
class _Panels:
    figures: list[Markup] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names of the runs that logged none of the section's keys."""
    legend: list[dict[str, Any]] = field(default_factory=list)
    reference: bool = False


def _group_seeds(runs: Sequence[RunSummary]) -> _Groups:
    """Group the runs that differ in the seed alone, in order of appearance."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(re.sub(r",? seed \S+$", "", run.name), []).append(run)
    return list(groups.items())


def _draw_panels(
    groups: _Groups, panels: Sequence[tuple[str, str, bool]], uids: Iterator[str], reference: str | None = None
) -> _Panels:
    """Draw one figure for each of `panels` that any run logged; the key `reference` adds one dashed grey mean line."""
    drawn: list[tuple[list[Curve], str, bool, list[str]]] = []
    seen: set[int] = set()
    for pattern, ylabel, percent in panels:
        curves: list[Curve] = []
        ends: list[str] = []
        for index, (name, group) in enumerate(groups):
            points = [series(run.log_history or [], pattern) for run in group]
            seen |= {id(run) for run, (x, _) in zip(group, points, strict=True) if x}
            group_curves = _build_curves([point for point in points if point[0]], index)
            curves += group_curves
            ends += [f"{name} ends at {group_curves[-1].y[-1]:.4g}"] if group_curves else []
        if curves:
            drawn.append((curves, ylabel, percent, ends))
    result = _Panels(missing=[run.name for _, group in groups for run in group if id(run) not in seen])
    for index, (name, group) in enumerate(groups):
        if seeds := sum(id(run) in seen for run in group):
            result.legend.append(make_legend_entry(name, index, seeds))
    for curves, ylabel, percent, ends in drawn:
        if reference:
            points = [series(run.log_history or [], reference) for _, group in groups for run in group]
            mean = mean_series([point for point in points if point[0]])
            result.reference = bool(mean[0])
            curves += [Curve(*mean, color=INK, dashes=(5, 2))] if mean[0] else []
        alt = describe_curves(ylabel, ends)
        result.figures.append(
            draw_curves(curves, uid=next(uids), ylabel=ylabel, alt=alt, columns=len(drawn), percent=percent)
        )
    return result


def _build_curves(points: Sequence[Points], index: int) -> list[Curve]:
    """Return one line for a single run; for several seeds thin lines and their mean, which comes last."""
    style: dict[str, Any] = {"color": index, "dashes": DASHES[index % len(DASHES)]}
    mean = mean_series(points) if len(points) > 1 else ([], [])
    curves = [Curve(*point, **style, thin=bool(mean[0])) for point in points]
    return curves + ([Curve(*mean, **style)] if mean[0] else [])


def _draw_sheet(run: RunSummary, uids: Iterator[str]) -> dict[str, Any]:
    """Draw the score distribution of one run, and list its sample pairs."""
    problem = histogram_problem(run.score_histogram)
    over_time = [
        Curve(*points, color=color, dashes=dashes)
        for key, color, dashes in (("kept", KEPT, ()), ("dropped", DROPPED, (4, 1.5)))
        if (points := series(run.log_history or [], f"selection_correlation_{key}"))[0]
    ]
    columns = 1 if problem or not over_time else 2
    figures = []
    if run.score_histogram is not None and not problem:
        counts = {name: sum(run.score_histogram[name]) for name in ("kept", "dropped")}
        alt = "Candidates by correlation: {kept:,.0f} kept and {dropped:,.0f} dropped.".format(**counts)
        figures.append(draw_histogram(run.score_histogram, uid=next(uids), alt=alt, columns=columns))
    if over_time:
        alt = "Mean correlation of kept and dropped candidates over optimiser steps."
        figures.append(draw_curves(over_time, uid=next(uids), ylabel="mean correlation", alt=alt, columns=columns))
    samples = [("Best kept", run.best_kept), ("Worst dropped", run.worst_dropped)]
    return {
        "name": run.name,
        "figures": figures,
        "problem": problem,
        "samples": [
            (heading, [_describe_sample(sample) for sample in (pairs or [])[:MAX_SAMPLES]])
            for heading, pairs in samples
        ],
    }


def _describe_sample(sample: PairSample) -> dict[str, Any]:
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


def _tabulate_results(runs: Sequence[RunSummary], table: list[dict] | None) -> Table:
    if table is None:
        return results_table([(run.name, collect_run_figures(run.metrics)) for run in runs], corner="run")
    rows = []
    for row in table:
        figures = {str(key): value for key, value in row.items() if key not in ("strategy", "seeds")}
        seeds = row.get("seeds")
        count = len(seeds) if isinstance(seeds, list | tuple) else 0
        name = f"{row.get('strategy')}" + (f" ({count} seeds)" if count > 1 else "")
        rows.append((name, figures))
    return results_table(rows, corner="strategy")


def _list_facts(runs: Sequence[RunSummary]) -> list[tuple[str, str]]:
    """Return the figures that a reader asks for first; the value is empty where no run has the figure."""

    def show_range(key: str, values: Sequence[object]) -> str:
        known = sorted(number for number in map(to_finite, values) if number is not None)
        shown = [format_number(number, key) for number in known[:1] + known[-1:]]
        return " to ".join(dict.fromkeys(shown))

    metrics = [run.metrics for run in runs]
    selection = [as_mapping(values.get("selection")) for values in metrics]
    times = [to_finite(as_mapping(values.get("times")).get("total_s")) for values in metrics]
    made = [values.get("injected_noise") for values in metrics]
    return [
        (
            "Strategy",
            ", ".join(dict.fromkeys(str(values["strategy"]) for values in metrics if values.get("strategy"))),
        ),
        ("Runs", str(len(runs)) if len(runs) > 1 else ""),
        ("Pairs", show_range("num_pairs", [values.get("num_pairs") for values in metrics])),
        ("Injected noise", "; ".join(dict.fromkeys(str(noise) for noise in made if noise))),
        ("Optimiser steps", show_range("steps", [values.get("steps") for values in metrics])),
        ("Final weights", "; ".join(dict.fromkeys(filter(None, map(describe_averaging, metrics))))),
        ("Kept of the candidates", show_range("kept_share", [values.get("kept_share") for values in selection])),
        ("Loaded of the candidates", show_range("loaded_share", [values.get("loaded_share") for values in selection])),
        ("Earlier visits of the kept", show_range("visits_kept", [values.get("visits_kept") for values in selection])),
        ("Mismatched among kept", show_range("noise_kept", [values.get("noise_kept") for values in selection])),
        (
            "Mismatched among candidates",
            show_range("noise_candidates", [_find_candidate_noise(run) for run in runs]),
        ),
        (
            "Mismatched, estimated by the run",
            show_range("estimated_mismatched", [values.get("estimated_mismatched") for values in selection]),
        ),
        (
            "Wall-clock, all runs" if len(runs) > 1 else "Wall-clock",
            show_range("total_s", [sum(time for time in times if time is not None)] if any(times) else []),
        ),
    ]


def _find_candidate_noise(run: RunSummary) -> float | None:
    """Return the share of mismatched pairs among the candidates of a run, from its figures or else from its logs."""
    figure = to_finite(as_mapping(run.metrics.get("selection")).get("noise_candidates"))
    logged = series(run.log_history or [], _NOISE_REFERENCE)[1]
    return figure if figure is not None else sum(logged) / len(logged) if logged else None


def _describe_noise(runs: Sequence[RunSummary]) -> str:
    """Return the shares of mismatched pairs over the whole of each run, as far as they are known."""
    parts = []
    for run in runs:
        kept = to_finite(as_mapping(run.metrics.get("selection")).get("noise_kept"))
        if kept is not None:
            shown = format_number(kept, "noise_kept"), format_number(_find_candidate_noise(run), "noise_candidates")
            parts.append(f"{run.name}: {shown[0]} of the kept, {shown[1]} of the candidates")
    return "; ".join(parts)


def _list_samples(runs: Sequence[RunSummary]) -> list[str]:
    """Return a note for each run whose training pairs were scored in part."""
    counts = [(run.name, run.metrics.get("scored_train_pairs"), run.metrics.get("num_pairs")) for run in runs]
    return [
        f"{name}: {count:,} of {total:,}" if total else f"{name}: the first {count:,} of a stream"
        for name, count, total in counts
        if count is not None
    ]


def _list_bad_rows(run: RunSummary) -> dict[str, Any]:
    bad = as_mapping(run.metrics.get("bad_rows"))
    ids = list(bad.get("ids") or [])
    return {
        "name": run.name,
        "count": bad.get("count"),
        "reasons": as_mapping(bad.get("reasons")),
        "ids": ids[:MAX_BAD_IDS],
        "more_ids": len(ids) > MAX_BAD_IDS,
        "shards": {split: as_mapping(part.get("shards")) for split, part in list_skipped_shards(run.metrics).items()},
        "problems": describe_problems(bad),
    }
