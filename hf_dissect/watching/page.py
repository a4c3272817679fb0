"""The page of a run that is watched: its report with a status, a script that renews it, and an audit if it has one."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_dissect.report.distillation import render_distillation_report
from hf_dissect.report.plots import series
from hf_dissect.report.selection import render_report
from hf_dissect.watching.run_folder import RunFolder, Seen

SCRIPT = (Path(__file__).parent / "watch.js").read_text("utf-8")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"connect-src 'self'; script-src 'sha256-{_HASH}'"
)
"""Content security policy: nothing from elsewhere, and no script but that of the page."""
_MISSING: dict[str, Any] = {
    "method": "not known yet",
    "student": "not known yet",
    "auxiliaries": [],
    "steps": None,
    "seed": "",
    "times": {"total_s": None},
    "warnings": [],
    "rows": dict.fromkeys(("complete", "unlabelled", "student_only", "unusable"), 0) | {"reasons": {}},
    "term_weights": {},
}
"""Entries that the report of a distillation needs."""


def render_watched(folder: RunFolder, version: str) -> str:
    """Return the page of a run folder as it is now.

    Args:
        folder: Reader of the folder.
        version: Word by which the script of the page knows that it has changed.
    """
    seen = folder.read()
    live = {
        "policy": POLICY,
        "script": Markup(SCRIPT),
        "version": version,
        "status": seen.status,
        "running": seen.running,
        "facts": _list_facts(seen),
        "audit": folder.audit.read(),
    }
    summary = seen.summary
    if seen.is_distillation:
        metrics = {**_MISSING, "name": summary.name, **summary.metrics}
        return render_distillation_report(metrics, summary.log_history, live)
    return render_report([summary], title=seen.title, live=live)


def _list_facts(seen: Seen) -> list[tuple[str, str]]:
    """Return the present estimate of the noisy channel, which the report has of the whole run only."""
    _, mismatched = series(seen.summary.log_history, "selection_estimated_mismatched")
    return [("Matched pairs, estimated (π)", f"{1 - mismatched[-1]:.3f}" if mismatched else "")]
