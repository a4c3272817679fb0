"""Base of the trainers: complete checkpoints or none, exact resuming, a stop on request, a card and a run folder."""

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from hf_dissect.distributed import Ranks
from hf_dissect.hub.publisher import Publisher
from hf_dissect.hub.push import Push
from hf_dissect.models.loading import check_same_architecture
from hf_dissect.models.sharding import ShardableScalars
from hf_dissect.mola.frozen_statistics import keep_frozen_statistics
from hf_dissect.training import checkpoints
from hf_dissect.training.averaged_weights import AveragedWeights
from hf_dissect.training.card_callback import ModelCardCallback
from hf_dissect.training.compiled_model import mark_shapes
from hf_dissect.training.final_figures import RunWriter
from hf_dissect.training.interruption import StoppedBySignal, StopRequest, explain_dead_worker
from hf_dissect.training.loss_since_log import LossSinceLog
from hf_dissect.training.non_finite import check_finite_weights
from hf_dissect.training.observer import RunObserver
from hf_dissect.training.resume_callback import ResumeCallback
from hf_dissect.training.run_folder import check_not_foreign, list_times, list_versions, replace_non_finite
from hf_dissect.training.run_state import Part, find_moved_step, move_schedule, read_state, restore_state, save_state
from hf_dissect.training.step_operations import StepOperations
from hf_dissect.training.summary import Summary
from hf_dissect.training.time_spent import TimeSpent
from hf_dissect.training.trainer_arguments import keep_all_rows
from hf_dissect.training.training_args import BaseTrainingArguments


class BaseTrainer(Trainer):
    """Base of the trainers of all kinds of runs.

    It writes checkpoints completely or not at all, ends with a checkpoint on SIGTERM, resumes runs exactly, updates
    the model card and publishes runs without anything private. A subclass defines what it saves (`save_extra`,
    `parts`), how it counts epochs (`begin_epoch`, `reset`) and what it reports (`compute_figures`, `summary`).

    Args:
        model: Model to train.
        args: Arguments of the run.
        recipe: Recipe of the run, which is saved with it; None without one.
        trainer_arguments: Further arguments of `transformers.Trainer`.

    Attributes:
        model_in_checkpoint: Folder, within a checkpoint, of the published model; "" for the checkpoint itself.
        timed_parts: Names of the parts of a run whose seconds are in `metrics.json`.
        ranks: `Ranks`, the processes of the run.
        times: `TimeSpent`, the seconds of the parts of the run.
        parts: Parts of the run whose state is saved, by name; a subclass adds parts.
        summary: `Summary` that reports the run; a subclass makes it.
        averaged_weights: Mean of the weights that ends as the model, see `average_weights` of the arguments.
    """

    model: nn.Module
    args: BaseTrainingArguments
    hub_model_id: str | None  # type: ignore[assignment]  # transformers declares None only
    card_callback: ClassVar[type[ModelCardCallback]]
    summary: Summary
    model_in_checkpoint: ClassVar[str] = ""
    timed_parts: ClassVar[tuple[str, ...]] = ("data", "training", "evaluation")
    # The loss is the mean over a micro-batch, to be divided by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self, model: nn.Module | None, args: BaseTrainingArguments, *, recipe: Any = None, **trainer_arguments: Any
    ) -> None:
        self.recipe, self.times, self.stop_request = recipe, TimeSpent(), StopRequest()
        self.publisher = Publisher(args, self.model_in_checkpoint)
        self._scalars: ShardableScalars | None = None  # for a model that is split over processes
        self._unfinished: Path | None = None  # folder of the checkpoint that is being written
        super().__init__(model=model, args=args, **trainer_arguments)
        self.ranks, self.loss_since_log = Ranks(self.accelerator), LossSinceLog(self)
        self.averaged_weights = AveragedWeights(self.args, self.accelerator, self.optimizer)
        self.observer = RunObserver(self.args, self.run_metrics, lambda: self.summary, self.callback_handler)
        self.parts = {"times": Part(self.times), "averaged_weights": Part(self.averaged_weights)}
        self.parts["alerts"] = Part(self.observer.alerts)
        self.parts["loss_since_log"] = Part(self.loss_since_log, each_rank=True)
        self.model_card = self.card_callback(self.run_metrics, self.describe_run)
        self.add_callback(ResumeCallback(self.stop_request, self.loss_since_log, self.begin_epoch))
        for callback in (self.model_card, self.averaged_weights, self.observer):
            self.add_callback(callback)

    # ---- methods for subclasses to extend ----

    def save_extra(self, folder: Path) -> None:
        """Write further files next to the weights, in checkpoints and at the end, on the process that saves."""
        if self.recipe is not None:
            self.recipe.save(folder / "recipe.yaml")

    def restore_extra(self, folder: str, has_state: bool) -> None:
        """Read the files of `save_extra` from a checkpoint.

        Args:
            folder: Folder of the checkpoint.
            has_state: True if the state of the parts was restored, False for a checkpoint of the plain Trainer.
        """

    def reset(self, step: int) -> None:
        """Discard the record of earlier calls of `train` from optimiser step `step` on."""

    def begin_epoch(self, epoch: float) -> None:
        """Prepare for an epoch that begins or continues, counted by the Trainer from 0."""

    def check_checkpoint(self, folder: str) -> None:
        """Check that a checkpoint fits the model; raise a `ValueError` if not."""
        check_same_architecture(self.model, folder)

    def compute_figures(self, test_dataset: Any, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the figures of the trained model by name, part by part; every rank calls this method."""
        raise NotImplementedError

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `transformers.Trainer.train`, and complete the run folder if `save_run_folder` is set.

        Args:
            resume_from_checkpoint: Checkpoint to resume from, or True for the last complete one in `output_dir`.
            args: Further arguments of `transformers.Trainer.train`.
            kwargs: Further arguments of `transformers.Trainer.train`.

        Raises:
            ValueError: The run has no checkpoint to resume from, or the checkpoint belongs to another model.
            CheckpointError: A checkpoint could not be written; the message names the last complete one.
            DataWorkerDied: A data worker died; the message names the last complete checkpoint.
            StoppedBySignal: The process received SIGTERM, and a checkpoint was written.
        """
        output_dir = self.args.output_dir
        checkpoint = checkpoints.choose_checkpoint(output_dir, resume_from_checkpoint)
        if checkpoint is None:
            check_not_foreign(output_dir, self.args.save_run_folder)
            self.reset(step=0)
        else:
            self.check_checkpoint(checkpoint)
        if self.is_world_process_zero():
            checkpoints.remove_unfinished(output_dir)
        with self.observer.note_failure(), self.stop_request.listen():  # also until the final figures
            output = self._train(checkpoint, *args, **kwargs)
            if self.args.save_run_folder:
                self.finish()
        return output

    def _train(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        with self.times.measure("training"), self.stop_request.listen(), explain_dead_worker(self.args.output_dir):
            output = super().train(checkpoint, *args, **kwargs)
            self._save_if_asked_late()
        if self.stop_request.granted:
            raise StoppedBySignal(str(checkpoints.find_last_checkpoint(self.args.output_dir)))
        self.averaged_weights.apply()  # not before, as a late checkpoint holds the weights in training
        return output

    def finish(self, test_dataset: Any = None, *, name: str | None = None, **options: Any) -> dict[str, Any]:
        """Evaluate the trained model, complete the run folder, and publish it if `push_to_hub` is set.

        The folder gets the model with its processor, the recipe, the metrics, a report and a card. Every rank calls
        this method, and the first one writes.

        Args:
            test_dataset: Data of the final figures; None for `eval_dataset`.
            name: Name of the run in report and figures; None for the name in its summary.
            options: Keyword arguments of `compute_figures`.

        Returns:
            Content of `metrics.json`.
        """
        parts = (self.args, self.state, self.summary, self.model_card, self.ranks, self.run_metrics)
        return RunWriter(*parts, name).write(
            self.compute_figures(test_dataset, **options),
            self.stop_request,
            save_model=partial(self.save_model, _internal_call=True),
            publish=self.push_run_folder if self.args.push_to_hub else None,
            evaluated="validation" if test_dataset is None else "test",
        )

    def run_metrics(self, final: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `metrics.json` on this process, with the figures `final`."""
        run = self.observer.describe() | {"seed": self.args.seed, "steps": self.state.global_step, "final": final}
        times = list_times(self.times.measure_so_far(), self.timed_parts)
        own = self.summary.collect_metrics(self.model, self.state.log_history) | self.averaged_weights.describe()
        return replace_non_finite({**run, **own, "times": times, "versions": list_versions()})

    def describe_run(self) -> dict[str, Any]:
        """Return the content of the card next to the metrics."""
        return {"model_id": self.hub_model_id, **self.summary.describe(self.model)}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of the Trainer, which ignores `dataloader_drop_last` so that all rows are evaluated."""
        with keep_all_rows(self.args):
            return super().get_eval_dataloader(eval_dataset)

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor, and the files of `save_extra` next to them.

        Raises:
            NonFiniteLossError: A weight is not finite.
            CheckpointError: A file could not be written.
        """
        run_folder, step = self.args.output_dir, self.state.global_step
        check_finite_weights(self.model, step, run_folder)
        name = "model" if self._unfinished is None else "checkpoint"
        with checkpoints.explain_unwritable(f"The {name} of step {step}", run_folder):
            if self.args.should_save:
                Path(output_dir or run_folder).mkdir(parents=True, exist_ok=True)
            self._save_weights(Path(output_dir or run_folder), output_dir, _internal_call)

    def _save_weights(self, folder: Path, output_dir: str | None, _internal_call: bool) -> None:
        if self.args.should_save:
            self.save_extra(folder)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        self._unfinished = run_folder / checkpoints.UNFINISHED_FOLDER
        try:
            with checkpoints.write_whole(final, self.ranks, publishes=self.is_local_process_zero()) as written:
                super()._save_checkpoint(model, trial)
                save_state(written, self.parts, self.args, self.ranks)
                self._name_best_checkpoint(written, final)
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            checkpoints.remove_surplus(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._scalars is not None and state_dict:
            state_dict = self._scalars.as_saved(state_dict)
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_if_asked_late(self) -> None:
        """Write a checkpoint for a SIGTERM that came after the last step had begun."""
        stopped_before = self.stop_request.granted
        self.stop_request.grant_if(bool(self.ranks.gather_numbers(self.stop_request.made).any()))
        # With `load_best_model_at_end`, the weights are those of the best step and not of the last one.
        if self.stop_request.granted and not stopped_before and not self.args.load_best_model_at_end:
            self._save_checkpoint(self.model, trial=None)

    def _name_best_checkpoint(self, written: Path, final: Path) -> None:
        """Replace the temporary name of the checkpoint if the Trainer chose it as the best one."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    # ---- resuming ----

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self._checkpoint_step = self.state.global_step
        if checkpoint is None:
            return trained
        step = find_moved_step(read_state(checkpoint), self.state, self.args, self.ranks, steps_per_epoch)
        if step is None:
            return trained
        self.state.global_step = step
        epochs, steps = divmod(step, steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *arguments: Any) -> Any:
        keep_frozen_statistics(self.model)
        self.floating_point_ops = StepOperations(super().floating_point_ops, self.model)  # type: ignore[method-assign]
        if self._scalars is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._scalars = ShardableScalars(self.model)
        return mark_shapes(super()._prepare_for_training(*arguments), self.data_collator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.reset(self._checkpoint_step)
        if (saved := read_state(checkpoint)) is not None:
            restore_state(saved, self.parts, self.ranks)
        self.averaged_weights.check_resumed(self.state, self._checkpoint_step, checkpoint)
        self.restore_extra(checkpoint, has_state=saved is not None)
        move_schedule(self.lr_scheduler, self._checkpoint_step, self.state.global_step)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or check that it can be written to; raise a `HubError` if not."""
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.open(token, private)

    def create_model_card(  # type: ignore[override]  # the run knows the other arguments of the Trainer
        self, dataset_tags: str | list[str] | None = None, **given: Any
    ) -> None:
        """Write the card of the run to `output_dir`, with `language`, `license`, `tags` and `dataset_tags`."""
        named = {name: given.get(name) for name in ("language", "license", "tags")}
        self.model_card.write(self.args, self.state, datasets=dataset_tags, **named)

    def push_to_hub(  # type: ignore[override]  # transformers returns a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_arguments: Any,
    ) -> Push | Future | None:
        """Save the model and publish the run folder, as `transformers.Trainer.push_to_hub`; every rank calls this.

        Returns:
            Result of the push, a future of it if not `blocking`, or None on other processes than the first.

        Raises:
            HubError: The Hub cannot be written to, or a file holds something private.
        """
        if self.is_world_process_zero() and (token or revision or self.hub_model_id is None):
            self.hub_model_id = self.publisher.open(token, private, revision)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self.create_model_card(**card_arguments)
        return self.push_run_folder(commit_message or "End of training", blocking)

    def push_run_folder(self, commit_message: str = "End of training", blocking: bool = True) -> Push | Future | None:
        """Publish the run folder in its present state, see `push_to_hub`."""
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
