"""A Trainer whose checkpoints are whole or absent, and whose runs can be ended at any moment and gone on with."""

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from hf_dissect.models.loading import same_architecture
from hf_dissect.models.sharding import ShardableScalars
from hf_dissect.training.checkpoints import (
    UNFINISHED_FOLDER,
    CheckpointError,
    last_complete_checkpoint,
    publish,
    remove_unfinished,
)
from hf_dissect.training.interruption import StoppedBySignal, StopRequest, death_of_a_worker_told
from hf_dissect.training.non_finite import check_finite_weights
from hf_dissect.training.run_state import moved_step, read_run_state

logger = logging.getLogger(__name__)


class DurableTrainer(Trainer):
    """Writes checkpoints wholly or not at all, ends with one on SIGTERM, and restores what the Trainer forgets.

    What a checkpoint holds beside the Trainer's files is written and read by the hooks `write_beside_model`,
    `save_state`, `restore_state` and `begin_anew`; `begin_epoch` is told of each epoch. Subclasses make the attribute
    `ranks` (`Ranks`) and, where the run has one, `recipe`.
    """

    recipe = None

    def __init__(self, *arguments, **keywords):
        self.stop_request = StopRequest()
        self.restored_loss: tuple[float, int] | None = None
        self.stops = False
        self._scalars: ShardableScalars | None = None  # of a model that is split over processes
        self._unfinished: Path | None = None  # where a checkpoint is being written
        super().__init__(*arguments, **keywords)
        self.add_callback(_ResumeCallback(self))

    # ---- what a subclass adds ----

    def write_beside_model(self, folder: Path) -> None:
        """Write what is saved beside the weights, in a checkpoint and at the end; called where files are written."""
        if self.recipe is not None:
            self.recipe.save(folder / "recipe.yaml")

    def save_state(self, folder: Path) -> None:
        """Write what a checkpoint holds beside the Trainer's own files; called on all ranks."""

    def restore_state(self, folder: str) -> None:
        """Go on from what `save_state` wrote."""

    def begin_anew(self, step: int) -> None:
        """Forget what earlier calls of `train` recorded after `step`."""

    def begin_epoch(self, epoch: float) -> None:
        """Heed that an epoch, counted from 0 by the Trainer, begins or goes on."""

    def check_checkpoint(self, folder: str) -> None:
        """Make sure that a checkpoint is one of this model (`ValueError`)."""
        same_architecture(self.model, folder)

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments):
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint to go on from, or True for the last complete one of `output_dir`.
            arguments: of `transformers.Trainer.train`.

        Raises:
            ValueError: there is no checkpoint to resume from, or it is another model's.
            CheckpointError, DataWorkerDied: what the names say; the last good checkpoint is named.
            StoppedBySignal: the process was told to end, and a checkpoint was written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No checkpoint to resume from in {self.args.output_dir}.")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self.check_checkpoint(resume_from_checkpoint)
        else:
            self.begin_anew(step=0)
        if self.is_world_process_zero():
            remove_unfinished(self.args.output_dir)
        self.stops = False
        with self.stop_request.heeded(), death_of_a_worker_told(self.args.output_dir):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)
            self._save_if_told_to_end_late()
        if self.stops:
            raise StoppedBySignal(str(last_complete_checkpoint(self.args.output_dir)))
        return output

    def heed(self, told_to_end: bool) -> None:
        """End the run after the current step, if a process of it was told to end."""
        if told_to_end and not self.stops:
            logger.warning("SIGTERM: a checkpoint is written after this step, then the run ends.")
        self.stops = self.stops or bool(told_to_end)

    # ---- writing ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor, and beside them what `write_beside_model` adds.

        Raises:
            NonFiniteLossError: weights are not finite.
            CheckpointError: the files cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        check_finite_weights(self.model, self.state.global_step, self.args.output_dir)
        what = "model" if self._unfinished is None else "checkpoint"
        with _unwritable_told(f"The {what} of step {self.state.global_step}", self.args.output_dir):
            self._save_model_and_more(folder, output_dir, _internal_call)

    def _save_model_and_more(self, folder: Path, output_dir: str | None, _internal_call: bool) -> None:
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_beside_model(folder)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        final = run_folder / name
        self._unfinished = run_folder / UNFINISHED_FOLDER
        try:
            with _unwritable_told(f"The checkpoint of step {self.state.global_step}", run_folder):
                super()._save_checkpoint(model, trial)
                self.save_state(self._unfinished / name)
                self._name_best_checkpoint(self._unfinished / name, final)
                self.ranks.wait()
                if self.is_local_process_zero():
                    publish(self._unfinished / name, final)
                self.ranks.wait()
        finally:
            if self.is_local_process_zero():
                remove_unfinished(run_folder)
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir=None, state_dict=None):
        if self._scalars is not None and state_dict:
            state_dict = self._scalars.as_saved(state_dict)
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._unfinished is None:  # else it is not written to its end yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_if_told_to_end_late(self) -> None:
        """Heed a request that came after the last step had begun."""
        stopped_before = self.stops
        self.heed(self.ranks.table(self.stop_request.made).any())
        # The weights of the best step, where they were loaded at the end, make no checkpoint of the last.
        if self.stops and not stopped_before and not self.args.load_best_model_at_end:
            self._save_checkpoint(self.model, trial=None)

    def _name_best_checkpoint(self, written: Path, final: Path) -> None:
        """Where the Trainer noted the unfinished checkpoint as the best one, note the name that it will have."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    # ---- going on ----

    def loss_since_log(self) -> tuple[float, int]:
        """Sum of this rank's losses since the last log, and the step of that log."""
        return float(self._tr_loss), self._globalstep_last_logged

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._checkpoint_step = self.state.global_step
        if resume_from_checkpoint is None:
            return trained
        step = moved_step(self, read_run_state(resume_from_checkpoint), num_update_steps_per_epoch)
        if step is None:
            return trained
        self.state.global_step = step
        epochs, steps = divmod(step, num_update_steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *arguments):
        if self._scalars is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._scalars = ShardableScalars(self.model)
        return super()._prepare_for_training(*arguments)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.begin_anew(self._checkpoint_step)
        self.restore_state(checkpoint)
        if self._checkpoint_step != self.state.global_step:
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            self.lr_scheduler.step()


class _ResumeCallback(TrainerCallback):
    def __init__(self, trainer: DurableTrainer):
        self._trainer = trainer
        self._saves_later = False  # when the epoch ends or is cut short

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self._trainer
        if trainer.restored_loss is not None:
            loss, trainer._globalstep_last_logged = trainer.restored_loss
            trainer._tr_loss += loss
            trainer._total_loss_scalar -= loss  # the mean of this call is that of its own steps
            trainer.restored_loss = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer.begin_epoch(state.epoch)

    def on_step_end(self, args, state, control, **kwargs):
        stops, ends_epoch = self._trainer.stops, state.epoch % 1 == 0
        # What is logged at the end of an epoch belongs into its last checkpoint, as a resumed run begins behind it.
        logs_later = ends_epoch and "epoch" in (args.eval_strategy, args.logging_strategy)
        self._saves_later = stops or (control.should_save and logs_later)
        control.should_save = control.should_save and not self._saves_later
        control.should_training_stop = control.should_training_stop or stops

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._trainer.stops and state.epoch % 1:  # cut short: its figures are due when the resumed run ends it
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_save or self._saves_later


@contextmanager
def _unwritable_told(what: str, run_folder: str | Path):
    """Turn an error of any of the writers into one that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_about_writing(error):
            raise
        free = shutil.disk_usage(run_folder).free / 2**20
        raise CheckpointError(
            f"{what} could not be written ({error}); {free:,.0f} MiB are free. Make room in {run_folder} and resume; "
            f"the last complete checkpoint is {last_complete_checkpoint(run_folder) or 'none'}."
        ) from error


def _is_about_writing(error: Exception) -> bool:
    # What is not written in Python tells of a full disk in words: torch in its own, tokenizers in those of Rust.
    words = ("PytorchStreamWriter", "inline_container", "iostream", "(os error ")
    return isinstance(error, OSError | SafetensorError) or any(part in str(error) for part in words)
