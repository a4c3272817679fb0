"""Report of a distillation: how far the terms came."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_dissect.report.data import replace_file
from hf_dissect.report.plots import DASHES, Curve, line_panel, series
from hf_dissect.version import __version__

# (heading, axis label, whether shares, logged keys and their names)
_NETWORKS = (("student", "student"), ("teacher", "teacher"), ("auxiliary_.*", "auxiliary"))
_PANELS = (
    (
        "Mutual information",
        "bound in nats",
        False,
        (("information_student", "I(T;S)"), ("information_auxiliary", "I(T;A)")),
    ),
    ("Discriminator", "accuracy", True, (("discriminator_accuracy", "accuracy"),)),
    ("Accuracy in training", "accuracy", True, tuple((f"{key}_accuracy", name) for key, name in _NETWORKS)),
    ("Accuracy in evaluation", "accuracy", True, tuple((f"eval_{key}_accuracy", name) for key, name in _NETWORKS)),
    ("Loss", "loss", False, (("loss", "all terms"),)),
)
_WARNINGS = {
    "teacher": "The teacher weakened in the course of the run: its accuracy fell well below its best.",
    "discriminator": "The discriminator saturated: the student learnt little from it.",
}


def write_distillation_report(path: str | Path, metrics: Mapping[str, Any], log_history: list[dict]) -> Path:
    """Write one HTML file that needs nothing else, from the content of `metrics.json` and the Trainer's logs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("distillation.html.jinja").render(
        metrics=metrics,
        version=__version__,
        warnings=[_WARNINGS[key] for key in metrics["warnings"]],
        panels=_panels(log_history),
    )
    return replace_file(path, page)


def _panels(log_history: list[dict]) -> list[dict]:
    uids, panels = map("f{}".format, itertools.count()), []
    for heading, ylabel, percent, lines in _PANELS:
        curves, names = [], []
        for place, (key, name) in enumerate(lines):
            points = series(log_history, key)
            if points[0]:
                curves.append(Curve(*points, color=place, dashes=DASHES[place % len(DASHES)]))
                names.append(f"{name} ends at {points[1][-1]:.4g}")
        if curves:
            alt = f"{heading} over optimiser steps: {'; '.join(names)}."
            figure = line_panel(curves, uid=next(uids), ylabel=ylabel, alt=alt, columns=2, percent=percent)
            panels.append({"heading": heading, "figure": figure, "names": names})
    return panels
