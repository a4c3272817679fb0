"""The curves of one run as one PNG file, for places without HTML, such as a model card on the Hub."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_dissect.report.data import replace_bytes
from hf_dissect.report.plots import Points, histogram_problem, series, thin_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "report.png"

_KEPT, _DROPPED, _PLAIN, _REFERENCE = "#0072b2", "#d55e00", "#00835f", "#60666d"
_DOTS_PER_INCH = 110


@dataclass(frozen=True)
class _Line:
    key: str  # pattern of the logged key, see `series`
    name: str
    color: str = _PLAIN
    style: str = "-"


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: tuple[_Line, ...]
    percent: bool = False


_PANELS = (
    _Panel("loss", (_Line("loss", "training"), _Line("eval_loss", "evaluation", _REFERENCE, "--"))),
    _Panel("recall sum of the evaluations", (_Line(r"eval_.*recall_sum", "recall sum"),)),
    _Panel(
        "mismatched pairs",
        (
            _Line("selection_noise_kept", "among the kept", _KEPT),
            _Line("selection_noise_candidates", "among the candidates", _REFERENCE, "--"),
            _Line("selection_estimated_mismatched", "as the run estimates", _PLAIN, ":"),
        ),
        percent=True,
    ),
    _Panel(
        "mean correlation",
        (
            _Line("selection_correlation_kept", "kept", _KEPT),
            _Line("selection_correlation_dropped", "dropped", _DROPPED, "--"),
        ),
    ),
)
_HISTOGRAM = "candidates of the last epoch by correlation"


def draw_run(
    path: str | os.PathLike, log_history: Sequence[Mapping], score_histogram: Mapping | None = None
) -> str | None:
    """Draw the logged figures of a run, and describe the picture.

    Args:
        path: PNG file; it is replaced only once the new one is complete.
        log_history: `trainer.state.log_history`.
        score_histogram: histogram of the last epoch, as in `RunSummary`.

    Returns:
        The picture in words; None if there is nothing to draw yet, and then no file is written.
    """
    panels = [(panel, curves) for panel in _PANELS if (curves := _select_curves(panel, log_history))]
    histogram = None if histogram_problem(score_histogram) else score_histogram
    if not panels and histogram is None:
        return None
    replace_bytes(path, _draw(panels, histogram))
    words = [
        f"{panel.title} ({', '.join(_describe_end(panel, *curve) for curve in curves)})" for panel, curves in panels
    ]
    return f"Curves of the run over optimiser steps: {'; '.join([*words, *([_HISTOGRAM] if histogram else [])])}."


def _select_curves(panel: _Panel, log_history: Sequence[Mapping]) -> list[tuple[_Line, Points]]:
    return [(line, points) for line in panel.lines if (points := series(log_history, line.key))[0]]


def _describe_end(panel: _Panel, line: _Line, points: Points) -> str:
    last = points[1][-1]
    return f"{line.name} ends at {f'{last:.1%}' if panel.percent else f'{last:.4g}'}"


def _draw(panels: Sequence[tuple[_Panel, list]], histogram: Mapping | None) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(panels) + (histogram is not None)
    columns = min(count, 2)
    rows = -(-count // columns)
    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.usetex": False}
    with matplotlib.rc_context(settings):
        width, height = 4.6 * columns, 2.7 * rows
        figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH)
        # A computed layout would take twice as long as the drawing.
        figure.subplots_adjust(0.45 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.3 / height, 0.14, 0.36)
        canvas = FigureCanvasAgg(figure)
        places = iter(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, curves in panels:
            _draw_lines(next(places), panel, curves)
        if histogram is not None:
            _draw_histogram(next(places), histogram)
        for place in places:
            place.set_axis_off()
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})  # the same run must give the same file
    return buffer.getvalue()


def _draw_lines(axes: "Axes", panel: _Panel, curves: list[tuple[_Line, Points]]) -> None:
    scale = 100 if panel.percent else 1
    for line, points in curves:
        x, y = thin_curve(*points)
        marker = "o" if len(x) <= 25 else None
        axes.plot(x, [value * scale for value in y], line.style, color=line.color, label=line.name, marker=marker)
        axes.lines[-1].set_markersize(3)
    axes.set_title(f"{panel.title} (%)" if panel.percent else panel.title, loc="left", fontsize=9.5)
    axes.set_xlabel("optimiser step")
    axes.set_xlim(0, max(max(points[0]) for _, points in curves) * 1.03 or 1)
    axes.locator_params(axis="x", integer=True)
    if panel.percent:
        axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_histogram(axes: "Axes", histogram: Mapping) -> None:
    for name, color, style in (("kept", _KEPT, "-"), ("dropped", _DROPPED, "--")):
        axes.stairs(histogram[name], histogram["edges"], color=color, linewidth=1.6, linestyle=style, label=name)
        axes.stairs(histogram[name], histogram["edges"], fill=True, color=color, alpha=0.2)
    axes.set_title(_HISTOGRAM, loc="left", fontsize=9.5)
    axes.set_xlabel("correlation, max(100 · cosine, 0)")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
