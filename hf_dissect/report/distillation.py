"""The report of a distillation: what the networks achieve, how far the terms came, and the rows that trained them."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dissect.report.data import replace_file
from hf_dissect.report.page import make_legend_entry, render_page
from hf_dissect.report.plots import DASHES, Curve, describe_curves, draw_curves, series, to_finite
from hf_dissect.report.tables import (
    MISSING,
    Cell,
    Table,
    as_mapping,
    compare_settings,
    describe_averaging,
    describe_problems,
    format_number,
    results_table,
    select_final_figures,
)


@dataclass(frozen=True)
class _Panel:
    heading: str
    ylabel: str
    keys: Mapping[str, str]
    """Pattern of a logged key -> name of its curve."""
    percent: bool = False


_NETWORKS = {"student": "student", "teacher": "teacher", "auxiliary_.*": "auxiliary"}
_PANELS = (
    _Panel(
        "Mutual information", "bound in nats", {"information_student": "I(T;S)", "information_auxiliary": "I(T;A)"}
    ),
    _Panel("Discriminator", "accuracy", {"discriminator_accuracy": "accuracy"}, percent=True),
    _Panel(
        "Accuracy in training",
        "accuracy",
        {f"{key}_accuracy": name for key, name in _NETWORKS.items()},
        percent=True,
    ),
    _Panel(
        "Accuracy in evaluation",
        "accuracy",
        {f"eval_{key}_accuracy": name for key, name in _NETWORKS.items()},
        percent=True,
    ),
    _Panel("Loss", "loss", {"loss": "all terms"}),
)
_WARNINGS = {
    "teacher": "The teacher weakened in the course of the run: its accuracy fell well below its best.",
    "discriminator": "The discriminator saturated: the student learnt little from it.",
}
_MEASURED = {
    "choice": "in the pilot, which chose the method",
    "before": "before training",
    "after": "after training",
}
_ESTIMATES = {
    "information_bound": "I(T;S), bound",
    "information_cap": "cap of the bound",
    "information_uncapped": "I(T;S), no cap",
    "label_entropy": "H(Y)",
    "student_label": "I(S;Y)",
    "teacher_label": "I(T;Y)",
    "auxiliaries_label": "I(A;Y|S)",
    "unlabelled_share": "share without label",
    "gain": "to gain",
}
_TIME_PARTS = ("data", "training", "evaluation")


def write_distillation_report(
    path: str | os.PathLike, metrics: Mapping[str, Any], log_history: Sequence[Mapping]
) -> Path:
    """Write the report of a distillation to `path` as one HTML file, and return the path.

    Args:
        path: HTML file; it is replaced only once the new one is complete.
        metrics: content of the run's `metrics.json`.
        log_history: `trainer.state.log_history`.
    """
    return replace_file(path, render_distillation_report(metrics, log_history))


def render_distillation_report(
    metrics: Mapping[str, Any], log_history: Sequence[Mapping], live: Mapping[str, Any] | None = None
) -> str:
    """Return the report that `write_distillation_report` writes; for `live`, see `render_page`."""
    name = metrics["name"]
    return render_page(
        "distillation.html.jinja",
        live=live,
        title=f"{name}: {metrics['method']}",
        facts=[
            ("Student of", metrics["student"]),
            ("Trained with", ", ".join(metrics["auxiliaries"])),
            ("Optimiser steps", format_number(metrics["steps"], "steps")),
            ("Final weights", describe_averaging(metrics) or ""),
            ("Seed", str(metrics["seed"])),
            ("Wall-clock", format_number(metrics["times"]["total_s"], "total_s")),
        ],
        runs=[(name, metrics)],
        time_parts=_TIME_PARTS,
        warnings=[_WARNINGS[key] for key in metrics["warnings"]],
        results=results_table([(name, select_final_figures(metrics))], corner="run"),
        panels=_draw_panels(log_history),
        information=_tabulate_information(metrics),
        rows=metrics["rows"],
        problems=[f"row {problem}" for problem in describe_problems(metrics["rows"])],
        terms=compare_settings([name], [metrics["term_weights"]], corner="weight of the term")[0],
    )


def _tabulate_information(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the estimates, and the prediction and the rows of each measurement, as sentences."""
    measured = as_mapping(metrics.get("information"))
    known = [(name, as_mapping(measured[when])) for when, name in _MEASURED.items() if when in measured]
    cells = [[Cell(_format_estimate(part.get(key))) for key in _ESTIMATES] for _, part in known]
    sentences = [f"{name[0].upper()}{name[1:]}: {part.get('sentence', MISSING)}." for name, part in known]
    held_out = list(dict.fromkeys(str(part.get("held_out", MISSING)) for _, part in known))
    table = Table([*_ESTIMATES.values()], [name for name, _ in known], cells, "measured")
    return {"table": table, "sentences": sentences, "held_out": held_out}


def _format_estimate(value: Any) -> str:
    number = to_finite(value)
    return "not known" if number is None else f"{number:.2f}"


def _draw_panels(log_history: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Draw one figure for each panel with a key that was logged."""
    uids, panels = map("f{}".format, itertools.count()), []
    for panel in _PANELS:
        curves, ends, legend = [], [], []
        for index, (pattern, name) in enumerate(panel.keys.items()):
            points = series(log_history, pattern)
            if points[0]:
                curves.append(Curve(*points, color=index, dashes=DASHES[index % len(DASHES)]))
                end = f"{name} ends at {points[1][-1]:.4g}"
                ends.append(end)
                legend.append(make_legend_entry(end, index))
        if curves:
            alt = describe_curves(panel.heading, ends)
            figure = draw_curves(
                curves, uid=next(uids), ylabel=panel.ylabel, alt=alt, columns=2, percent=panel.percent
            )
            panels.append({"heading": panel.heading, "figure": figure, "legend": legend})
    return panels
