"""Callback that passes on when epochs begin, and lets a checkpoint wait for the logs of its epoch."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.training.interruption import StopRequest
from hf_dissect.training.loss_since_log import LossSinceLog


class ResumeCallback(TrainerCallback):
    """Callback of a trainer that can end after any step and be resumed.

    Args:
        stop_request: Request to end the run.
        loss_since_log: Loss that is restored when training begins.
        begin_epoch: Function that takes the Trainer's count of epochs when one begins or continues.
    """

    def __init__(
        self, stop_request: StopRequest, loss_since_log: LossSinceLog, begin_epoch: Callable[[float], None]
    ) -> None:
        self._stop_request = stop_request
        self._loss_since_log = loss_since_log
        self._begin_epoch = begin_epoch
        self._saves_later = False  # when the epoch ends or is cut short

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the loss since the last log, which the Trainer sets to zero."""
        self._loss_since_log.apply()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the epoch on."""
        self._begin_epoch(state.epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put off a checkpoint that ends an epoch until the epoch's figures are logged; end the run if asked."""
        stops, ends_epoch = self._stop_request.granted, state.epoch % 1 == 0
        # What is logged at the end of an epoch belongs into its last checkpoint, as a resumed run begins behind it.
        logs_later = ends_epoch and "epoch" in (args.eval_strategy, args.logging_strategy)
        self._saves_later = stops or (control.should_save and logs_later)
        control.should_save = control.should_save and not self._saves_later
        control.should_training_stop = control.should_training_stop or stops

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save a checkpoint that was put off."""
        if (
            self._stop_request.granted and state.epoch % 1
        ):  # cut short: its figures are due when the resumed run ends it
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_save or self._saves_later
