"""Trainer of a student with a teacher that reads more modalities, which exist at training time only."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, set_seed

from hf_dissect.data.problems import read_problems
from hf_dissect.distillation.data_collator import DistillationCollator, compute_row_masks
from hf_dissect.distillation.diagnostics import Meter, RowCounts, Watch
from hf_dissect.distillation.evaluation import compute_prediction_metrics
from hf_dissect.distillation.losses.conditional_entropy import Adversary, Discriminator, discriminator_loss
from hf_dissect.distillation.measurement import Measurement, read_groups
from hf_dissect.distillation.model_card import StudentCard
from hf_dissect.distillation.networks import DistillationNetworks, build_networks, standardise_rows
from hf_dissect.distillation.objective import DistillationObjective
from hf_dissect.distillation.reload_check import make_reload_check
from hf_dissect.distillation.saved_student import STUDENT_FOLDER, check_networks
from hf_dissect.distillation.student import StudentForClassification, find_feature_size
from hf_dissect.distillation.summary import DistillationSummary
from hf_dissect.distillation.training_args import DistillationTrainingArguments
from hf_dissect.distillation.training_data import (
    Columns,
    check_arguments,
    choose_modalities,
    make_collator,
    read_evaluation_rows,
    read_rows,
)
from hf_dissect.hub.published_files import ENCODER_FOLDER
from hf_dissect.training.non_finite import check_finite
from hf_dissect.training.run_folder import drop_speed
from hf_dissect.training.run_state import Part
from hf_dissect.training.trainer import BaseTrainer


class DistillationTrainer(BaseTrainer):
    """Trainer of a student of one modality with others that exist at training time only.

    The student, an encoder of each auxiliary modality and a teacher that fuses all modalities learn together, by the
    terms that `args.method` and `args.term_weights` name. This is a reconstruction of AMID (CVPR 2023, arXiv
    2306.07646) from its abstract, see `DistillationObjective`. A row without an auxiliary modality trains only the
    student's task; a row without a label trains the terms that need none. The run saves the student, which needs none
    of the other networks.

    The teacher of the baselines "hinton" and "crd" trains next to the student as well, by its own task losses: no
    method has a better teacher to compare the student with than another.

    Args:
        model: Encoder of the student, such as a `CLIPVisionModel` or a `FrameSequenceEncoder`, or a
            `StudentForClassification`.
        args: `DistillationTrainingArguments`.
        auxiliaries: Encoder of each auxiliary modality, by column.
        train_dataset: `datasets.Dataset` or mapping of columns, with the modalities and the labels.
        eval_dataset: The same for evaluation, where the auxiliary modalities may be missing; None for no evaluation.
        processors: Image processor or tokenizer of each modality of pictures or texts, by column; all other modalities
            are arrays.
        recipe: Recipe of the run, saved with it.
        trainer_arguments: Further arguments of `transformers.Trainer`.

    Attributes:
        student: `StudentForClassification` that trains.
        model: All `DistillationNetworks`.
        modalities: Columns of the modalities that the method reads, the student's first.
        labels: Names of the classes.
        adversary: Discriminator and its optimiser; None if the conditional entropy has no weight.
        rows: `RowCounts` of the rows that lack something.
        measurement: `Measurement` of what the teacher knows.

    Raises:
        TypeError: `args` are not `DistillationTrainingArguments`.
        ValueError: A column is missing or empty, lengths differ, or the arguments do not fit each other.
    """

    args: DistillationTrainingArguments
    model: DistillationNetworks
    data_collator: DistillationCollator
    model_in_checkpoint = STUDENT_FOLDER
    card_callback = StudentCard

    def __init__(
        self,
        model: PreTrainedModel,
        args: DistillationTrainingArguments,
        auxiliaries: Mapping[str, PreTrainedModel],
        train_dataset: Columns,
        eval_dataset: Columns | None = None,
        processors: Mapping[str, Any] | None = None,
        recipe: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}; pass DistillationTrainingArguments.")
        self.processors = dict(processors or {})
        self.modalities = choose_modalities(args, auxiliaries, self.processors)
        train_rows = read_rows("train_dataset", train_dataset, self.modalities, args)
        self.labels = train_rows.labels
        evaluation_rows = read_evaluation_rows(eval_dataset, self.modalities, args, self.labels)
        check_arguments(args, trainer_arguments, self.modalities, evaluation_rows)
        set_seed(args.seed)
        super().__init__(
            build_networks(model, auxiliaries, self.labels, args),
            args,
            recipe=recipe,
            data_collator=make_collator(model, auxiliaries, train_dataset, self.modalities, self.processors, args),
            train_dataset=train_rows,
            eval_dataset=evaluation_rows,
            compute_metrics=self._compute_metrics,
            **trainer_arguments,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Distillation trains with DDP; choose an accelerate configuration without FSDP and DeepSpeed."
            )
        self.adversary = self._make_adversary()
        self.objective: DistillationObjective = DistillationObjective(args, self.adversary)
        self.meter = Meter()
        self.watch = Watch(args.teacher_drop, args.discriminator_ceiling)
        self.rows = RowCounts(args.max_bad_fraction, len(train_rows))
        rows = (train_rows, evaluation_rows, read_groups(recipe, train_dataset))
        self.measurement = Measurement(args, self.model, self.data_collator, rows, self.ranks, self.times, self.log)
        self.summary = DistillationSummary(
            args,
            measurement=self.measurement,
            auxiliaries=self.modalities[1:],
            recipe=recipe,
            watch=self.watch,
            rows=self.rows,
            processor=self.processors.get(args.student_column),
            shape=self.data_collator.shapes.get(args.student_column, ()),
        )
        self.parts |= {"watch": Part(self.watch), "banks": Part(self.objective)}
        self.parts["measurement"] = Part(self.measurement)
        self.parts["rows"] = Part(self.rows, each_rank=True, join=RowCounts.join_states)
        self.parts["meter"] = Part(self.meter, each_rank=True)
        if self.adversary is not None:
            self.parts["adversary"] = Part(self.adversary)
        self.add_callback(make_reload_check(self.data_collator, train_rows, args.student_column))
        self.add_callback(self.measurement)

    @property
    def student(self) -> StudentForClassification:
        """Student that trains, with its heads."""
        return self.model.student

    def _make_adversary(self) -> Adversary | None:
        if not self.args.weights.needs_generator:
            return None
        discriminator = Discriminator(
            self.args.teacher_size, find_feature_size(self.student.encoder), self.args.discriminator_size
        )
        return Adversary(discriminator.to(self.args.device), self.args.discriminator_learning_rate)

    # ---- a step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the Trainer's batches; count rows that lack something, and share requests to end the run."""
        with self.times.measure("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.rows.add(batch["row"].cpu(), batch["row_state"].cpu(), read_problems(batch))
        self.stop_request.grant_if(bool(self.ranks.gather_numbers(self.stop_request.made).any()))
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the weighted terms of a batch, see `DistillationObjective`."""
        has_label, has_auxiliaries = compute_row_masks(inputs["row_state"])
        outputs = model(inputs["inputs"], has_auxiliaries)
        # The student's features condition the discriminator, which needs them at a scale that does not drift.
        outputs["student_features"] = standardise_rows(outputs["student_features"])
        progress = self.state.global_step / max(self.state.max_steps, 1)
        loss = self.objective(outputs, inputs["label"], has_label, has_auxiliaries, progress, self.meter)
        self._last_outputs = {name: value.detach() for name, value in outputs.items()}
        self._last_outputs["has_auxiliaries"] = has_auxiliaries
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Do the Trainer's step, then train the discriminator on the features of the same forward pass."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_finite(loss, "the loss", inputs["row"].cpu(), self.state.global_step, self.args.output_dir)
        if self.adversary is not None:
            accuracy = self.adversary.accumulate(
                self._compute_discriminator_loss, 1 / self.current_gradient_accumulation_steps
            )
            self.meter.add("discriminator_accuracy", accuracy)
            if self.accelerator.sync_gradients:
                self.adversary.step()
        return loss

    def _compute_discriminator_loss(self, discriminator: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("real", "generated", "student_features", "has_auxiliaries")
        return discriminator_loss(discriminator, *(self._last_outputs[name] for name in names))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, in training with those of the terms, and warn if teacher or discriminator fail."""
        if "loss" in logs:
            logs.update(self.meter.pop(self.ranks))
        self.watch.check(logs)
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the networks.

        Args:
            eval_dataset: `datasets.Dataset` or mapping of columns; None for the trainer's.
            ignore_keys: Not used; outputs are chosen by their name.
            metric_key_prefix: Prefix of the names of the metrics.

        Returns:
            The loss and the metrics of `compute_prediction_metrics`: accuracy of the student and, if the data have
            their modalities, of teacher and auxiliaries, and R@1 of the student's embeddings, the share of rows whose
            nearest other row is of their class.
        """
        with self.times.measure("evaluation"):
            rows = read_evaluation_rows(eval_dataset, self.modalities, self.args, self.labels)
            return super().evaluate(rows, ignore_keys, metric_key_prefix=metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        """Predict a batch.

        Returns:
            The student's cross-entropy, a scalar; the logits of all networks and the student's embeddings; labels and
            states of the rows. The last two are None with `prediction_loss_only`.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model(inputs["inputs"])
        has_label, _ = compute_row_masks(inputs["row_state"])
        losses = nn.functional.cross_entropy(outputs["student_logits"].float(), inputs["label"], reduction="none")
        loss = losses[has_label].mean() if has_label.any() else losses.sum() * 0
        if prediction_loss_only:
            return loss, None, None
        predictions = {name: value.float() for name, value in outputs.items() if name.endswith("_logits")}
        predictions["student_embeds"] = outputs["student_embeds"]
        self._prediction_names = list(predictions)
        return loss, tuple(predictions.values()), (inputs["label"], inputs["row_state"])

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = dict(zip(self._prediction_names, prediction.predictions, strict=True))
        label, row_state = cast(tuple[Any, Any], prediction.label_ids)
        return compute_prediction_metrics(predictions, label, row_state)

    @torch.no_grad()
    def embed(self, dataset: Columns) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the labelled rows of a data set with the student; each rank embeds all of them.

        Args:
            dataset: `datasets.Dataset` or mapping of columns.

        Returns:
            Embeddings `(n, E)` of unit length and labels int64 `(n,)`, on the CPU.
        """
        rows = read_rows("dataset", dataset, self.modalities, self.args, labels=self.labels)
        self.model.eval()
        embeds, labels = [], []
        for start in range(0, len(rows), self.args.eval_batch_size):
            chosen = range(start, min(start + self.args.eval_batch_size, len(rows)))
            batch = self._prepare_inputs(self.data_collator([rows[row] for row in chosen]))
            has_label, _ = compute_row_masks(batch["row_state"])
            inputs = cast(dict[str, Any], batch["inputs"])
            with self.compute_loss_context_manager():
                output = self.student(**inputs[self.args.student_column])
            embeds.append(output.embeds[has_label].cpu())
            labels.append(batch["label"][has_label].cpu())
        return torch.cat(embeds), torch.cat(labels)

    def compute_figures(self, test_dataset: Any, **options: Any) -> Iterator[dict[str, float]]:
        """Evaluate the trained networks on `test_dataset`, by default the `eval_dataset`."""
        self.measurement.measure("after")
        dataset = self.eval_dataset if test_dataset is None else test_dataset
        if dataset is not None:
            yield drop_speed(self.evaluate(dataset, metric_key_prefix="final"), "final")

    # ---- files ----

    def _save_weights(self, folder: Path, output_dir: str | None, _internal_call: bool) -> None:
        """Save the student; in a checkpoint, save all networks and the student next to them."""
        if self._unfinished is not None:
            super()._save_weights(folder, output_dir, _internal_call)
            return
        if self.args.should_save:
            super().save_extra(folder)
            self._save_student(folder)
        if self.args.push_to_hub and not _internal_call:  # as the Trainer does
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def save_extra(self, folder: Path) -> None:
        """Write the recipe, and the student with another copy of the recipe."""
        super().save_extra(folder)
        self._save_student(folder / STUDENT_FOLDER)
        super().save_extra(folder / STUDENT_FOLDER)

    def _save_student(self, folder: Path) -> None:
        self.student.save_pretrained(folder)
        self.student.encoder.save_pretrained(folder / ENCODER_FOLDER)
        if (processor := self.processors.get(self.args.student_column)) is not None:
            processor.save_pretrained(folder)
            processor.save_pretrained(folder / ENCODER_FOLDER)

    def reset(self, step: int) -> None:
        """Discard the figures of an earlier call of `train`."""
        self.meter.reset()

    def check_checkpoint(self, folder: str) -> None:
        """Check that a checkpoint holds these networks.

        Raises:
            ValueError: Files are missing, or the checkpoint holds other networks.
        """
        check_networks(folder, self.model)


AuxiliaryDistillationTrainer = DistillationTrainer
"""Former name of the trainer."""
