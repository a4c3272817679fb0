"""Callback that reports the beginning of epochs, and delays a checkpoint until the logs of its epoch are written."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.training.interruption import StopRequest
from hf_dissect.training.loss_since_log import LossSinceLog


class ResumeCallback(TrainerCallback):
    """Callback of a trainer that can stop after any step and be resumed.

    Args:
        stop_request: Request to end the run.
        loss_since_log: Loss to restore when training begins.
        begin_epoch: Function that is called with the Trainer's epoch, from 0, when an epoch begins or continues.
    """

    def __init__(
        self, stop_request: StopRequest, loss_since_log: LossSinceLog, begin_epoch: Callable[[float], None]
    ) -> None:
        self._stop_request = stop_request
        self._loss_since_log = loss_since_log
        self._begin_epoch = begin_epoch
        self._saves_later = False  # at the end of the epoch, or when it is interrupted

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the loss since the last log, which the Trainer sets to zero."""
        self._loss_since_log.apply()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the epoch that begins or continues."""
        self._begin_epoch(state.epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delay the checkpoint at the end of an epoch until its figures are logged, and stop the run on request."""
        stops, ends_epoch = self._stop_request.granted, state.epoch % 1 == 0
        # A resumed run begins with the next epoch, so the last checkpoint must hold the logs at the end of this one.
        logs_later = ends_epoch and "epoch" in (args.eval_strategy, args.logging_strategy)
        self._saves_later = stops or (control.should_save and logs_later)
        control.should_save = control.should_save and not self._saves_later
        control.should_training_stop = control.should_training_stop or stops

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save a delayed checkpoint."""
        if self._stop_request.granted and state.epoch % 1:
            # The epoch was interrupted: the resumed run logs its figures at its end.
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_save or self._saves_later
