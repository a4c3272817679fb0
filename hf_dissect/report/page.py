"""The HTML page that every report is: one file that needs no network, no script and no model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_dissect.report.plots import DASHES, NUM_COLORS, to_finite
from hf_dissect.report.tables import as_mapping, compare_settings, format_number
from hf_dissect.version import __version__

_REST = "other"
_SHOWN_ELSEWHERE = ("teacher", "discriminator")
"""Subjects of alerts that the report of a distillation has warnings of."""


def render_page(
    template: str,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    runs: Sequence[tuple[str, Mapping[str, Any]]],
    time_parts: Sequence[str],
    live: Mapping[str, Any] | None = None,
    **values: Any,
) -> str:
    """Fill a template of the folder `templates`, and return the page.

    Args:
        template: file name of a template that extends `page.html.jinja`.
        title: heading of the page.
        facts: names and values of the figures at the top of the page; empty values are left out.
        runs: name and content of `metrics.json` of each run on the page; times, settings and versions are read here.
        time_parts: keys of the measured times, without `_s`; the rest of the total is shown as "other".
        live: status of a run that is watched while it trains, see `hf_dissect.watching.page`; None for a page that
            stays as it is.
        values: everything else that the template shows.
    """
    names, metrics = [name for name, _ in runs], [content for _, content in runs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = format_number
    return environment.get_template(template).render(
        title=title,
        version=__version__,
        facts=[(name, value) for name, value in (*(live["facts"] if live else ()), *facts) if value],
        time_parts=(*time_parts, _REST),
        times=_measure_bars(runs, time_parts),
        settings=compare_settings(names, [content.get("settings") for content in metrics], corner="setting"),
        versions=compare_settings(names, [content.get("versions") for content in metrics], corner="package"),
        alerts=_list_alerts(runs),
        live=live,
        **values,
    )


def _list_alerts(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the alerts of all runs as sentences, named by the run where there are several."""
    found = [
        (name, entry)
        for name, metrics in runs
        for entry in metrics.get("alerts") or []
        if isinstance(entry, Mapping) and entry.get("subject") not in _SHOWN_ELSEWHERE
    ]
    return [
        f"{f'{name}, step' if len(runs) > 1 else 'Step'} {entry.get('step')}: {entry.get('title')}. "
        f"{entry.get('text')}"
        for name, entry in found
    ]


def make_legend_entry(name: str, index: int, seeds: int = 1) -> dict[str, Any]:
    """Return the legend entry of curve number `index`: name, colour index, SVG dash array and number of seeds."""
    dashes = " ".join(str(2 * length) for length in DASHES[index % len(DASHES)])
    return {"name": name, "color": index % NUM_COLORS, "dashes": dashes, "seeds": seeds}


def _measure_bars(runs: Sequence[tuple[str, Mapping[str, Any]]], time_parts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the seconds of each part, and the width of its bar in per cent of the longest run."""
    rows: list[dict[str, Any]] = []
    for name, metrics in runs:
        times = as_mapping(metrics.get("times"))
        parts = {part: max(to_finite(times.get(f"{part}_s")) or 0.0, 0.0) for part in time_parts}
        total = max(to_finite(times.get("total_s")) or 0.0, sum(parts.values()))
        rows.append({"name": name, "total": total, "parts": {**parts, _REST: total - sum(parts.values())}})
    longest = max((row["total"] for row in rows), default=0.0)
    for row in rows:
        row["widths"] = {name: 100 * value / longest for name, value in row["parts"].items()} if longest else {}
    return rows
