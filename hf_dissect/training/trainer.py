"""Base of the trainers: whole checkpoints or none, exact resuming, an end on request, a card and a run folder."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from hf_dissect.distributed import Ranks
from hf_dissect.hub.publisher import Publisher
from hf_dissect.hub.push import Push
from hf_dissect.models.loading import same_architecture
from hf_dissect.models.sharding import ShardableScalars
from hf_dissect.training.card_callback import ModelCardCallback
from hf_dissect.training.checkpoints import (
    UNFINISHED_FOLDER,
    explain_unwritable,
    find_checkpoint,
    last_complete_checkpoint,
    remove_surplus,
    remove_unfinished,
    write_whole,
)
from hf_dissect.training.interruption import StoppedBySignal, StopRequest, explain_dead_worker
from hf_dissect.training.loss_since_log import LossSinceLog
from hf_dissect.training.non_finite import check_finite_weights
from hf_dissect.training.resume_callback import ResumeCallback
from hf_dissect.training.run_folder import METRICS_FILE, finite, installed_versions, times_of_parts, write_json
from hf_dissect.training.run_state import Part, moved_step, read_state, restore_state, save_state
from hf_dissect.training.summary import Summary
from hf_dissect.training.time_spent import TimeSpent


class BaseTrainer(Trainer):
    """Trainer that every kind of run shares.

    It writes checkpoints wholly or not at all, ends with one on SIGTERM, restores what the Trainer forgets, keeps a
    model card current and publishes runs without anything private. A subclass says what it saves (`save_extra`,
    `parts`), how it counts epochs (`begin_epoch`, `reset`) and what it reports (`final_figures`, `summary`).

    Args:
        model: The model.
        args: Arguments of the run.
        recipe: Recipe of the run, saved with it.
        trainer_arguments: Further arguments of `transformers.Trainer`.

    Attributes:
        model_in_checkpoint: Folder, within a checkpoint, of the model that is published; "" for the checkpoint itself.
        timed_parts: Parts of a run whose seconds `metrics.json` holds.
        ranks: `Ranks`, the processes of the run.
        times: `TimeSpent`, the seconds of its parts.
        parts: Parts of the run whose state a checkpoint holds, by name; a subclass adds its own.
        summary: `Summary` that reports the run; made by the subclass.
    """

    card_callback: ClassVar[type[ModelCardCallback]]
    summary: Summary
    model_in_checkpoint: ClassVar[str] = ""
    timed_parts: ClassVar[tuple[str, ...]] = ("data", "training", "evaluation")
    # The loss is the mean over a micro-batch, to be divided by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self, model: nn.Module | None, args: TrainingArguments, *, recipe: Any = None, **trainer_arguments: Any
    ):
        self.recipe, self.times = recipe, TimeSpent()
        self.publisher = Publisher(args, self.model_in_checkpoint)
        self.stop_request = StopRequest()
        self._scalars: ShardableScalars | None = None  # of a model that is split over processes
        self._unfinished: Path | None = None  # where a checkpoint is being written
        super().__init__(model=model, args=args, **trainer_arguments)
        self.ranks = Ranks(self.accelerator)
        self.loss_since_log = LossSinceLog(self)
        self.parts = {"times": Part(self.times), "loss_since_log": Part(self.loss_since_log, each_rank=True)}
        self.model_card = self.card_callback(self.run_metrics, self.describe_run)
        self.add_callback(ResumeCallback(self.stop_request, self.loss_since_log, self.begin_epoch))
        self.add_callback(self.model_card)

    # ---- what a subclass adds ----

    def save_extra(self, folder: Path) -> None:
        """Write what is saved next to the weights, in a checkpoint and at the end; called where files are written."""
        if self.recipe is not None:
            self.recipe.save(folder / "recipe.yaml")

    def restore_extra(self, folder: str, has_state: bool) -> None:
        """Restore what `save_extra` wrote and what follows from the restored parts.

        Args:
            folder: Folder of the checkpoint.
            has_state: Whether the parts were restored; a checkpoint of the plain Trainer has no state of theirs.
        """

    def reset(self, step: int) -> None:
        """Discard what earlier calls of `train` recorded from optimiser step `step` on."""

    def begin_epoch(self, epoch: float) -> None:
        """Prepare for an epoch that begins or continues; `epoch` is the Trainer's count, from 0."""

    def check_checkpoint(self, folder: str) -> None:
        """Check that a checkpoint is one of this model (`ValueError`)."""
        same_architecture(self.model, folder)

    def final_figures(self, test_dataset: Any, **options: Any) -> dict[str, Any]:
        """Evaluate the trained model; called on all ranks."""
        raise NotImplementedError

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any) -> TrainOutput:
        """Train as the Trainer does; with `save_run_folder`, leave a complete run folder.

        Args:
            resume_from_checkpoint: Checkpoint to resume from, or True for the last complete one of `output_dir`.
            arguments: Further arguments of `transformers.Trainer.train`.

        Raises:
            ValueError: there is no checkpoint to resume from, or it is another model's.
            CheckpointError, DataWorkerDied: see there; the last good checkpoint is named.
            StoppedBySignal: the process was asked to end, and a checkpoint was written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_checkpoint(self.args.output_dir)
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is None:
            self.reset(step=0)
        else:
            self.check_checkpoint(checkpoint)
        if self.is_world_process_zero():
            remove_unfinished(self.args.output_dir)
        output = self._train(checkpoint, **arguments)
        if self.args.save_run_folder:
            self.finish()
        return output

    def _train(self, checkpoint: str | None, **arguments: Any) -> TrainOutput:
        with self.times.measure("training"), self.stop_request.listening(), explain_dead_worker(self.args.output_dir):
            output = super().train(resume_from_checkpoint=checkpoint, **arguments)
            self._save_if_asked_late()
        if self.stop_request.granted:
            raise StoppedBySignal(str(last_complete_checkpoint(self.args.output_dir)))
        return output

    def finish(self, test_dataset: Any = None, *, name: str | None = None, **options: Any) -> dict[str, Any]:
        """Evaluate the trained model, write the run folder, and return the content of `metrics.json`.

        Called on all ranks, written by the first. The folder gets the model and what belongs to it, the recipe, the
        metrics, a report and a model card; with `push_to_hub` it is published.

        Args:
            test_dataset: Data of the final figures; None for the trainer's `eval_dataset`.
            name: Name of the run in report and figures; None for its own.
            options: Keyword arguments of `final_figures`.
        """
        # First, so that nothing that follows can cost the trained model; not pushed before the rest is there.
        self.save_model(_internal_call=True)
        final = self.final_figures(test_dataset, **options)
        metrics = {**self.run_metrics(final), **self.summary.gathered_metrics(self.ranks)}
        if name is not None:
            metrics["name"] = name
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            write_json(folder / METRICS_FILE, metrics)
            self.summary.write_report(folder, metrics, self.state.log_history)
        # After all else: PEFT writes a card of its own next to each adapter it saves.
        self.model_card.finish(self.args, self.state, metrics, "validation" if test_dataset is None else "test")
        if self.args.push_to_hub:
            self.push_run_folder()
        return metrics

    def run_metrics(self, final: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `metrics.json` as far as this process knows it, with `final` as final figures."""
        run = {"seed": self.args.seed, "steps": self.state.global_step, "final": final}
        times = times_of_parts(self.times.so_far(), self.timed_parts)
        own = self.summary.metrics(self.model, self.state.log_history)
        return finite({**run, **own, "times": times, "versions": installed_versions()})

    def describe_run(self) -> dict[str, Any]:
        """Return what the card shows next to the metrics."""
        return {"model_id": self.hub_model_id, **self.summary.describe(self.model)}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the Trainer's loader, always with the last rows: `dataloader_drop_last` is for training batches."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor, and next to them what `save_extra` adds.

        Raises:
            NonFiniteLossError: weights are not finite.
            CheckpointError: the files cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        check_finite_weights(self.model, self.state.global_step, self.args.output_dir)
        name = "model" if self._unfinished is None else "checkpoint"
        with explain_unwritable(f"The {name} of step {self.state.global_step}", self.args.output_dir):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
            self._save_weights(folder, output_dir, _internal_call)

    def _save_weights(self, folder: Path, output_dir: str | None, _internal_call: bool) -> None:
        if self.args.should_save:
            self.save_extra(folder)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        self._unfinished = run_folder / UNFINISHED_FOLDER
        try:
            with write_whole(final, self.ranks, names_it=self.is_local_process_zero()) as written:
                super()._save_checkpoint(model, trial)
                save_state(written, self.parts, self.args, self.ranks)
                self._name_best_checkpoint(written, final)
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            remove_surplus(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._scalars is not None and state_dict:
            state_dict = self._scalars.as_saved(state_dict)
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_if_asked_late(self) -> None:
        """Save once more for a request to end that came after the last step had begun."""
        stopped_before = self.stop_request.granted
        self.stop_request.grant_if(self.ranks.table(self.stop_request.made).any())
        # The weights of the best step, where they were loaded at the end, make no checkpoint of the last.
        if self.stop_request.granted and not stopped_before and not self.args.load_best_model_at_end:
            self._save_checkpoint(self.model, trial=None)

    def _name_best_checkpoint(self, written: Path, final: Path) -> None:
        """Replace the name of the unfinished checkpoint, where the Trainer noted it as the best one."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    # ---- resuming ----

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._checkpoint_step = self.state.global_step
        if resume_from_checkpoint is None:
            return trained
        saved = read_state(resume_from_checkpoint)
        step = moved_step(saved, self.state, self.args, self.ranks, num_update_steps_per_epoch)
        if step is None:
            return trained
        self.state.global_step = step
        epochs, steps = divmod(step, num_update_steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *arguments: Any) -> Any:
        if self._scalars is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._scalars = ShardableScalars(self.model)
        return super()._prepare_for_training(*arguments)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.reset(self._checkpoint_step)
        saved = read_state(checkpoint)
        if saved is not None:
            restore_state(saved, self.parts, self.ranks)
        self.restore_extra(checkpoint, has_state=saved is not None)
        if self._checkpoint_step != self.state.global_step:
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            self.lr_scheduler.step()

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or check that it can be written to (`HubError`)."""
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.open(token, private)

    def create_model_card(self, dataset_tags: str | list[str] | None = None, **given: Any) -> None:
        """Write the run's card to `output_dir`, as `transformers.Trainer.create_model_card`.

        `language`, `license`, `tags` and `dataset_tags` go to the metadata; all else is known from the run.
        """
        named = {name: given.get(name) for name in ("language", "license", "tags")}
        self.model_card.write(self.args, self.state, datasets=dataset_tags, **named)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_arguments: Any,
    ) -> Push | Future | None:
        """Save the model and publish the run folder, as `transformers.Trainer.push_to_hub`; called on all processes.

        Other processes than the first get None. A `HubError` says what cannot be written or would publish a secret.
        """
        if self.is_world_process_zero() and (token or revision or self.hub_model_id is None):
            self.hub_model_id = self.publisher.open(token, private, revision)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card_arguments)
        return self.push_run_folder(commit_message, blocking)

    def push_run_folder(self, commit_message: str = "End of training", blocking: bool = True) -> Push | Future | None:
        """Publish the run folder as it is, see `push_to_hub`."""
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return self.publisher.push(commit_message, blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer calls this before the checkpoint has its name; `_save_checkpoint` calls it again.
        if self._unfinished is not None or not self.is_world_process_zero() or not self.publisher.is_due:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.publisher.push_checkpoint(checkpoint_folder, self.state)

    def _finish_current_push(self) -> None:
        self.publisher.wait()
