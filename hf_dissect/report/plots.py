"""Figures of the reports as inline SVG, so that one HTML file follows the reader's light or dark theme.

No figure contains text of the user: run names go into the legends of the page, where the template escapes them.
Colours are written as placeholders and replaced by CSS variables of the page.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Points drawn per curve. Longer curves are averaged in blocks, which keeps the file small."""

INK, GRID, KEPT, DROPPED = "#0b0000", "#0b0001", "#0b0002", "#0b0003"
_PLACEHOLDERS = {INK: "--muted", GRID: "--line", KEPT: "--kept", DROPPED: "--dropped"}
# The first is solid, the others differ even without colour; on/off lengths in line widths.
DASHES = ((), (5, 1.6), (1.2, 1.4), (5, 1.4, 1.2, 1.4))
NUM_COLORS = 8

# Inches, by the number of panels in a row; the page scales each to its column, so letters are always about 12 px high.
_SIZES = {1: (8.6, 3.0), 2: (4.4, 2.9), 3: (3.1, 2.4)}

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Curve:
    """One line of a panel; `color` is an index into the palette of the page, or one of the placeholders above."""

    x: list[float]
    y: list[float]
    color: int | str = 0
    dashes: tuple[float, ...] = ()
    thin: bool = False


def to_finite(value: object) -> float | None:
    """Convert `value` to a finite float, or to None if it is NaN, infinite, a boolean or not a number."""
    if value is None or isinstance(value, bool | str):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def series(log_history: Sequence[Mapping], pattern: str) -> Points:
    """Return steps and values of the first logged key that matches all of `pattern` (case ignored), without NaN.

    The Trainer logs an evaluation after the loss of the same step, so a step seen twice keeps its last value.
    """
    points: dict[float, float] = {}
    for entry in log_history:
        step = to_finite(entry.get("step"))
        key = next((key for key in entry if re.fullmatch(pattern, str(key), re.IGNORECASE)), None)
        value = to_finite(entry[key]) if key is not None else None
        if step is not None and value is not None:
            points[step] = value
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def mean_series(all_points: Sequence[Points]) -> Points:
    """Return the mean over runs at the steps that all of them logged; both lists are empty if they share none."""
    if not all_points:
        return [], []
    by_step = [dict(zip(*points, strict=True)) for points in all_points]
    common = sorted(set.intersection(*(set(values) for values in by_step)))
    return common, [sum(values[step] for values in by_step) / len(by_step) for step in common]


def describe_curves(heading: str, ends: Sequence[str]) -> str:
    """Describe a panel for readers who cannot see it; `ends` says where each curve ends."""
    return f"{heading[0].upper()}{heading[1:]} over optimiser steps: {'; '.join(ends)}."


def draw_curves(
    curves: Sequence[Curve], *, uid: str, ylabel: str, alt: str, columns: int, percent: bool = False
) -> Markup:
    """Draw a panel of curves over optimiser steps.

    Args:
        curves: at least one curve.
        uid: a word that no other figure of the page has.
        ylabel: label of the vertical axis.
        alt: description of the panel for readers who cannot see it.
        columns: number of panels next to each other.
        percent: show shares in [0, 1] as per cent, from zero.
    """
    with _open_figure(columns) as (figure, axes):
        for curve in curves:
            x, y = thin_curve(curve.x, curve.y)
            scale = 100 if percent else 1
            axes.plot(
                x,
                [value * scale for value in y],
                color=curve.color if isinstance(curve.color, str) else _encode_color(curve.color),
                linestyle=(0, curve.dashes) if curve.dashes else "-",
                linewidth=0.9 if curve.thin else 1.7,
                alpha=0.45 if curve.thin else 1.0,
                marker="o" if len(x) <= 25 and not curve.thin else None,
                markersize=3.2,
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"{ylabel} (%)" if percent else ylabel)
        # A run of one evaluation has a single x: without room around it the axis would show fractions of a step.
        last = max((max(curve.x) for curve in curves if curve.x), default=1)
        axes.set_xlim(0, max(last, 1) * 1.03)
        axes.locator_params(axis="x", integer=True)
        if percent:
            axes.set_ylim(bottom=0)
        return _convert_to_markup(figure, uid, alt)


def draw_histogram(histogram: Mapping, *, uid: str, alt: str, columns: int) -> Markup:
    """Draw the counts of kept and dropped candidates by correlation.

    Args:
        histogram: `edges` `(n + 1,)` and the counts `kept` and `dropped`, each `(n,)`.
        uid: a word that no other figure of the page has.
        alt: description of the panel for readers who cannot see it.
        columns: number of panels next to each other.
    """
    edges = [float(edge) for edge in histogram["edges"]]
    with _open_figure(columns) as (figure, axes):
        for name, color, dashes in (("kept", KEPT, ()), ("dropped", DROPPED, (4, 1.5))):
            counts = [float(count) for count in histogram[name]]
            axes.stairs(counts, edges, fill=True, color=color, alpha=0.22, linewidth=0)
            axes.stairs(counts, edges, color=color, linewidth=1.6, linestyle=(0, dashes) if dashes else "-")
        axes.set_xlabel("correlation, max(100 · cosine, 0)")
        axes.set_ylabel("candidates")
        axes.set_ylim(bottom=0)
        return _convert_to_markup(figure, uid, alt)


def histogram_problem(histogram: Mapping | None) -> str | None:
    """Return a sentence that says why `histogram` cannot be drawn, or None if it can."""
    if not histogram:
        return "No candidate was scored in the last epoch: the rule needs no scores, or the run stopped before."
    parts = {name: [to_finite(value) for value in histogram.get(name) or []] for name in ("edges", "kept", "dropped")}
    sizes = {name: len(values) for name, values in parts.items()}
    if sizes["kept"] == 0 or not sizes["edges"] - 1 == sizes["kept"] == sizes["dropped"]:
        return "The recorded histogram is incomplete: {edges} edges, {kept} kept and {dropped} dropped counts.".format(
            **sizes
        )
    numbers = {name: [value for value in values if value is not None] for name, values in parts.items()}
    if numbers != parts:
        return "The recorded histogram holds values that are not finite numbers."
    if any(right <= left for left, right in zip(numbers["edges"], numbers["edges"][1:], strict=False)):
        return "The recorded histogram's edges do not increase."
    if sum(numbers["kept"]) + sum(numbers["dropped"]) == 0:
        return "The recorded histogram is empty: no candidate was counted in the last epoch."
    return None


def thin_curve(x: Sequence[float], y: Sequence[float]) -> Points:
    """Return at most `MAX_POINTS` points of a curve, each the mean of a block."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    block = math.ceil(len(x) / MAX_POINTS)
    starts = range(0, len(x), block)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + block]) / len(values[i : i + block]) for i in starts]

    return means(x), means(y)


def _encode_color(index: int) -> str:
    return f"#0a00{index % NUM_COLORS:02x}"


@contextmanager
def _open_figure(columns: int) -> Iterator[tuple["Figure", "Axes"]]:
    """Yield a figure outside pyplot, under settings that hold for this block only."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
        "svg.hashsalt": "hf_dissect",  # the same run gives the same file
        "text.parse_math": False,
        "text.usetex": False,
        "font.size": 9,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZES[min(columns, 3)], layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _convert_to_markup(figure: "Figure", uid: str, alt: str) -> Markup:
    """Convert a figure to an inline `<svg>` with theme variables as colours, unique ids and an alternative text."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    drawing = re.search(r'viewBox="([^"]+)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert drawing is not None  # matplotlib writes no other
    view_box, body = drawing.groups()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]+; ", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{uid}-", body).replace("xlink:href", "href")
    body = re.sub(r"#0a00([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", body)
    for placeholder, variable in _PLACEHOLDERS.items():
        body = body.replace(placeholder, f"var({variable})")
    body = re.sub(r"\s+", " ", body).replace("> <", "><")
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>').format(view_box, alt, Markup(body))
