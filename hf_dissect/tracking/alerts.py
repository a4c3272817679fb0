"""Alerts of a run that somebody should look at: in the log, in the report, and in the trackers that have alerts."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alert:
    """A reason to look at a run.

    Args:
        subject: What it is about; a run raises one alert for each subject.
        title: A few words.
        text: What was seen, and what to do.
        warned: True if the log has a warning of it already.
    """

    subject: str
    title: str
    text: str
    warned: bool = False


class AlertLog:
    """Alerts of a run so far, which a resumed run does not raise again.

    Attributes:
        raised: Alerts as `step`, `subject`, `title` and `text`, in order.
    """

    def __init__(self) -> None:
        self.raised: list[dict[str, Any]] = []

    def add(self, alerts: Iterable[Alert], step: int) -> list[Alert]:
        """Add the alerts whose subjects are new, warn of them, and return them."""
        known = {entry["subject"] for entry in self.raised}
        new = [alert for alert in alerts if alert.subject not in known]
        for alert in new:
            entry = {"subject": alert.subject, "title": alert.title, "text": alert.text}
            self.raised.append({"step": step, **entry})
            if not alert.warned:
                logger.warning("Step %d: %s. %s", step, alert.title, alert.text)
        return new

    def describe(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`; empty without alerts."""
        return {"alerts": list(self.raised)} if self.raised else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the alerts so far."""
        return {"raised": list(self.raised)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved alerts."""
        self.raised = [dict(entry) for entry in state["raised"]]


def find_skipped_rows(bad: int, judged: int, limit: float, setting: str) -> list[Alert]:
    """Return an alert if more rows are skipped than half of the share that would end the run.

    Args:
        bad: Number of rows that cannot train.
        judged: Number of rows that they are among.
        limit: Largest share that a run accepts.
        setting: Name of the setting of the limit.
    """
    if not judged or bad <= limit * judged / 2:
        return []
    text = (
        f"{bad:,} of {judged:,} rows cannot be used ({bad / judged:.2%}); the run ends above {limit:.2%} ({setting}). "
        "The log and metrics.json say what is wrong with the first of them."
    )
    return [Alert("skipped_rows", "Many rows are skipped", text)]


def find_gradient_not_finite(logs: Mapping[str, Any], half_precision: bool) -> list[Alert]:
    """Return an alert if the logged norm of the gradient is NaN or infinite, after which no weight is.

    Args:
        logs: Logged figures.
        half_precision: True for fp16, whose loss scaling skips such steps on purpose.
    """
    norm = logs.get("grad_norm")
    if half_precision or not isinstance(norm, int | float) or abs(norm) < float("inf"):
        return []
    text = (
        f"The norm of the gradient is {norm}. The weights will not be finite after such a step, and the next loss "
        "ends the run. Try a smaller learning rate, a longer warm-up, or max_grad_norm."
    )
    return [Alert("gradient", "The gradient is not finite", text)]
