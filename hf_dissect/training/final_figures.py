"""The end of a run: model, figures as they come, report and card, so that no fault and no signal loses them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_dissect.distributed import Ranks
from hf_dissect.training.card_callback import ModelCardCallback
from hf_dissect.training.interruption import StoppedAfterTraining, StopRequest
from hf_dissect.training.run_folder import METRICS_FILE, write_json
from hf_dissect.training.summary import Summary

UNFINISHED = "unfinished"
"""Key in `metrics.json` of a run whose figures are not complete."""


class RunWriter:
    """Writer of the files that complete a run folder.

    Args:
        args: Arguments of the run.
        state: State of the Trainer.
        summary: Reporter of the run.
        card: Writer of the card.
        ranks: Processes of the run.
        run_metrics: Function from the figures so far to the content of `metrics.json` on this process.
        name: Name of the run in report and figures; None for the name in its summary.
    """

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        summary: Summary,
        card: ModelCardCallback,
        ranks: Ranks,
        run_metrics: Callable[[dict[str, Any]], dict[str, Any]],
        name: str | None,
    ) -> None:
        self._args, self._state, self._summary, self._card, self._ranks = args, state, summary, card, ranks
        self._run_metrics = run_metrics
        self._name = name
        self._folder = Path(str(args.output_dir))

    def write(
        self,
        figures: Iterable[dict[str, Any]],
        stop_request: StopRequest,
        *,
        save_model: Callable[[], Any],
        publish: Callable[[], Any] | None,
        evaluated: str,
    ) -> dict[str, Any]:
        """Write the model, the figures as they come, report and card; every rank calls this method.

        SIGTERM ends it at once, between two files: the model and the figures so far stay.

        Args:
            figures: Final figures by name, part by part.
            stop_request: Listener for SIGTERM.
            save_model: Function that saves the model.
            publish: Function that publishes the folder; None to publish nothing.
            evaluated: Split of the figures, "validation" or "test".

        Returns:
            Content of `metrics.json`.

        Raises:
            StoppedAfterTraining: The process received SIGTERM.
        """
        with stop_request.listen():
            # The model comes first, so that no later error loses it, and is pushed with the rest of the folder.
            with stop_request.hold():
                save_model()
            asked = bool(self._ranks.gather_numbers(stop_request.made).any())
            so_far: dict[str, Any] = {}
            self._write_metrics({**self._make_metrics(so_far), UNFINISHED: True})
            with stop_request.interrupt(lambda: StoppedAfterTraining(self._folder), asked):
                for part in figures:
                    so_far |= part
                    self._write_metrics({**self._make_metrics(so_far), UNFINISHED: True})
                metrics = self._make_metrics(so_far)
                with stop_request.hold():
                    self._write_metrics(metrics)
                    if self._args.should_save:
                        self._summary.write_report(self._folder, metrics, self._state.log_history)
                    # The card comes last, because PEFT writes a card next to each adapter that it saves.
                    self._card.finish(self._args, self._state, metrics, evaluated)
                if publish is not None:
                    publish()
        return metrics

    def _make_metrics(self, figures: dict[str, Any]) -> dict[str, Any]:
        named = {} if self._name is None else {"name": self._name}
        return {**self._run_metrics(figures), **self._summary.gather_metrics(self._ranks), **named}

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        if self._args.should_save:
            write_json(self._folder / METRICS_FILE, metrics)
