"""Observer of a run while it trains: its live page, its alerts, and what its trackers show of the pairs."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_dissect.report.live import STOPPED, TRAINED, TRAINING, LiveRun, append_log, find_digests, restart_log
from hf_dissect.tracking.alerts import Alert, AlertLog, find_gradient_not_finite
from hf_dissect.tracking.trackers import Trackers
from hf_dissect.training.card_callback import find_last_evaluation
from hf_dissect.training.interruption import find_dead_worker
from hf_dissect.training.non_finite import NonFiniteLossError
from hf_dissect.training.summary import Summary
from hf_dissect.training.training_args import BaseTrainingArguments

logger = logging.getLogger(__name__)

RESULTS = ("metrics.json", "report_data.json")
"""Files of a finished run, which in the folder of a run that trains are those of an earlier one."""
LEAST_SECONDS = 5.0
MOST_SHARE = 0.02
"""Largest share of the time that looking at the run may take."""


class Pace:
    """Rest after a costly step, so that its share of the time stays small.

    Args:
        least: Least number of seconds between the ends of two steps.
    """

    def __init__(self, least: float) -> None:
        self._least, self._due = least, 0.0

    @property
    def is_due(self) -> bool:
        """True if the next step may begin."""
        return time.monotonic() >= self._due

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Take the time of a step."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._due = end + max(self._least, (end - start) / MOST_SHARE)


class RunObserver(TrainerCallback):
    """Callback that writes `log.jsonl` and `live.json`, raises alerts, and sends pairs and alerts to trackers.

    All of it happens on the first process alone, and none of it can end the run.

    Args:
        args: Arguments of the run.
        run_metrics: Function from the final figures to the content of `metrics.json` on this process.
        get_summary: Function that returns the reporter of the run, which is made after this callback.
        handler: Holder of the callbacks of the trainer, those of the trackers among them.

    Attributes:
        alerts: Alerts of the run.
    """

    def __init__(
        self,
        args: BaseTrainingArguments,
        run_metrics: Callable[[dict[str, Any]], dict[str, Any]],
        get_summary: Callable[[], Summary],
        handler: CallbackHandler,
    ) -> None:
        self.alerts = AlertLog()
        self._args, self._run_metrics, self._get_summary = args, run_metrics, get_summary
        self._trackers = Trackers(handler)
        self._state: TrainerState | None = None
        self._live = self._checks = Pace(LEAST_SECONDS)
        self._earlier: dict[str, str] = {}
        self._sent_at: int | None = None
        self._warned: set[str] = set()

    @property
    def _folder(self) -> Path:
        return Path(str(self._args.output_dir))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the files of the run with the logs of the checkpoint that it resumes from."""
        self._state = state
        self._checks, self._sent_at = Pace(0.0), None
        if state.global_step == 0:
            self.alerts.raised = []
        if not state.is_world_process_zero:
            return
        with self._tolerate("files of the live page"):
            self._earlier = find_digests(self._folder, RESULTS)
            restart_log(self._folder, state.log_history)
        self._show(TRAINING)
        self._live = Pace(LEAST_SECONDS)  # the first log is shown at once

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the figures, look for reasons to raise an alert, and renew the live page if it is due."""
        if not state.is_world_process_zero or not state.log_history:
            return
        self._state = state
        with self._tolerate("log.jsonl"):
            append_log(self._folder, state.log_history[-1])
        self._raise(find_gradient_not_finite(logs or {}, self._args.fp16))
        if self._checks.is_due:
            self._check()
        if self._live.is_due and self._is_training(state):
            self._show(TRAINING)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the pairs of the epoch to the trackers, once for several evaluations of one step."""
        if not state.is_world_process_zero:
            return
        self._check()
        if self._args.report_pairs and self._sent_at != state.global_step and self._trackers.used:
            self._sent_at = state.global_step
            with self._tolerate("pairs for the trackers"):
                self._trackers.send_pairs(self._get_summary().show_pairs(), state.global_step)
        if self._is_training(state):
            self._show(TRAINING)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check once more; when training ends, this comes before the trackers close."""
        if state.is_world_process_zero:
            self._check()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the run as it ended."""
        if state.is_world_process_zero:
            self._show(TRAINED)

    def describe(self) -> dict[str, Any]:
        """Return the entry of `metrics.json` about alerts; empty without any."""
        return self.alerts.describe()

    @contextmanager
    def note_failure(self) -> Iterator[None]:
        """Raise an alert for weights or losses that are not finite, and show on the live page why the block ended."""
        try:
            yield
        except BaseException as error:
            if self._state is not None and self._state.is_world_process_zero:
                if isinstance(error, NonFiniteLossError):
                    self._raise([Alert("not_finite", "Loss or weights are not finite", str(error), warned=True)])
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                with suppress(Exception):  # the death of another worker may strike here, too
                    self._show(STOPPED, reason)
            raise

    def _is_training(self, state: TrainerState) -> bool:
        return state.global_step < state.max_steps

    def _check(self) -> None:
        if self._state is not None:
            with self._checks.measure(), self._tolerate("checks of the run"):
                progress = self._state.global_step / max(self._state.max_steps, 1)
                self._raise(self._get_summary().find_alerts(self._state.log_history, progress))

    def _raise(self, alerts: Iterable[Alert]) -> None:
        step = 0 if self._state is None else self._state.global_step
        for alert in self.alerts.add(alerts, step):
            self._trackers.send_alert(alert, step)

    def _show(self, what: str, reason: str = "") -> None:
        state = self._state
        if state is None:
            return
        with self._live.measure(), self._tolerate("live.json"):
            metrics = self._run_metrics(find_last_evaluation(state))
            summary, title = self._get_summary().summarize(metrics)
            place: dict[str, Any] = {
                "step": state.global_step,
                "max_steps": state.max_steps,
                "epoch": float(state.epoch or 0),
            }
            LiveRun(summary, title, what, reason, earlier=self._earlier, **place).save(self._folder)

    @contextmanager
    def _tolerate(self, what: str) -> Iterator[None]:
        """Turn an error of the block into a warning, once for each `what`: training must not end for its sake."""
        try:
            yield
        except Exception as error:
            if find_dead_worker(error) is not None:  # a signal raises it wherever the process is just then
                raise
            if what not in self._warned:
                self._warned.add(what)
                # As text, since a record of the error itself would keep all that its frames hold.
                logger.warning("%s: %s (%s); training continues.", what, str(error), type(error).__name__)
