"""The Trainer of a student, of the teacher that sees more than it, and of the modalities that only training has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, set_seed

from hf_dissect.distillation.data_collator import DistillationCollator, array_shape, row_masks
from hf_dissect.distillation.diagnostics import Meter, RowCounts, Watch
from hf_dissect.distillation.evaluation import prediction_metrics
from hf_dissect.distillation.losses.conditional_entropy import Adversary, Discriminator, discriminator_loss
from hf_dissect.distillation.model_card import StudentCard
from hf_dissect.distillation.networks import DistillationNetworks, standardised
from hf_dissect.distillation.objective import DistillationObjective
from hf_dissect.distillation.saved_student import STUDENT_FOLDER
from hf_dissect.distillation.student import StudentForClassification, feature_size
from hf_dissect.distillation.summary import DistillationSummary
from hf_dissect.distillation.training_args import AuxiliaryDistillationArguments
from hf_dissect.distillation.training_data import Columns, ModalityRows
from hf_dissect.hub.published_files import ENCODER_FOLDER
from hf_dissect.training.non_finite import check_finite
from hf_dissect.training.run_folder import drop_speed
from hf_dissect.training.run_state import STATE_FILE, Part
from hf_dissect.training.trainer import BaseTrainer


class DistillationTrainer(BaseTrainer):
    """Trains a student of one modality with others that exist at training time only.

    A teacher that fuses all modalities, an encoder of each auxiliary one, and the student learn together, by the terms
    that `args.method` and `args.term_weights` name (see `DistillationObjective`; after AMID, CVPR 2023, arXiv
    2306.07646, of which this is a reconstruction from the abstract). A row without an auxiliary modality trains the
    student's task alone, one without a label the terms that need none. What is saved at the end is the student, which
    needs none of the others.

    The teacher of the baselines "hinton" and "crd" trains beside the student, by its own task losses alone: no term
    compares a student with a better teacher than another one has.

    Args:
        model: the student's encoder, such as a `CLIPVisionModel` or a `FrameSequenceEncoder`, or a
            `StudentForClassification`.
        auxiliaries: encoder of each auxiliary modality, by its column.
        args: `AuxiliaryDistillationArguments`.
        train_dataset, eval_dataset: a `datasets.Dataset`, or a mapping of columns, with the modalities and the labels;
            that of the evaluation may lack the auxiliary modalities.
        processors: of each modality that is pictures or text, its image processor or tokenizer; all others are arrays.
        recipe: of the run, saved with it.
        trainer_arguments: anything else `transformers.Trainer` takes.

    Attributes:
        student: the `StudentForClassification` that trains.
        model: all `DistillationNetworks`.
        adversary: the discriminator and its optimiser; None where the conditional entropy has no weight.
        rows: `RowCounts` of what rows lacked.

    Raises:
        TypeError: `args` are no `AuxiliaryDistillationArguments`.
        ValueError: a column is missing or empty, lengths differ, or the settings do not go together.
    """

    model_in_checkpoint = STUDENT_FOLDER
    card_callback = StudentCard

    def __init__(
        self,
        model: PreTrainedModel,
        args: AuxiliaryDistillationArguments,
        auxiliaries: Mapping[str, PreTrainedModel],
        train_dataset: Columns,
        eval_dataset: Columns | None = None,
        processors: Mapping[str, Any] | None = None,
        recipe=None,
        **trainer_arguments,
    ):
        if not isinstance(args, AuxiliaryDistillationArguments):
            raise TypeError(f"args is {type(args).__name__}; pass hf_dissect.distillation's arguments.")
        self.modalities = _modalities(args, auxiliaries, processors or {})
        train_rows = _rows("train_dataset", train_dataset, self.modalities, args)
        self.labels = train_rows.labels
        self.processors = dict(processors or {})
        set_seed(args.seed)
        super().__init__(
            self._networks(model, auxiliaries, args),
            args,
            recipe=recipe,
            data_collator=self._collator(model, auxiliaries, args, train_dataset),
            train_dataset=train_rows,
            eval_dataset=self._evaluation_rows(eval_dataset, args),
            compute_metrics=self._metrics,
            **trainer_arguments,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Distillation trains with DDP; choose an accelerate configuration without FSDP, DeepSpeed."
            )
        self.adversary = self._make_adversary()
        self.objective = DistillationObjective(args, self.adversary)
        self.meter = Meter()
        self.watch = Watch(args.teacher_drop, args.discriminator_ceiling)
        self.rows = RowCounts(args.max_bad_fraction, len(train_rows))
        self.summary = DistillationSummary(
            args,
            auxiliaries=self.modalities[1:],
            recipe=recipe,
            watch=self.watch,
            rows=self.rows,
            processor=self.processors.get(args.student_column),
            shape=self.data_collator.shapes.get(args.student_column, ()),
        )
        self.parts["watch"] = Part(self.watch)
        self.parts["banks"] = Part(self.objective)
        self.parts["rows"] = Part(self.rows, each_rank=True, join=RowCounts.join_states)
        self.parts["meter"] = Part(self.meter, each_rank=True)
        if self.adversary is not None:
            self.parts["adversary"] = Part(self.adversary)

    @property
    def student(self) -> StudentForClassification:
        return self.model.student

    # ---- what is built ----

    def _networks(self, model, auxiliaries, args) -> DistillationNetworks:
        student = model
        if not isinstance(model, StudentForClassification):
            student = StudentForClassification.of(model, self.labels, args.embedding_size)
        elif student.config.num_labels != len(self.labels):
            raise ValueError(
                f"model has {student.config.num_labels} classes and the training data {len(self.labels)}; pass its "
                "encoder alone for new heads."
            )
        return DistillationNetworks(
            student,
            auxiliaries,
            args.weights,
            student_modality=args.student_column,
            teacher_size=args.teacher_size,
            comparison_size=args.comparison_size,
            teacher_learns=args.teacher_learns,
            classifies=args.classification_weight > 0,
            retrieves=args.retrieval_weight > 0,
        )

    def _collator(self, model, auxiliaries, args, columns) -> DistillationCollator:
        encoder = model.encoder if isinstance(model, StudentForClassification) else model
        encoders = {args.student_column: encoder, **auxiliaries}
        arrays = [name for name in self.modalities if name not in self.processors]
        shapes = {name: array_shape(columns[name], name) for name in arrays}
        input_names = {name: encoders[name].main_input_name for name in arrays}
        return DistillationCollator(self.modalities, input_names, self.processors, shapes, args.max_caption_length)

    def _make_adversary(self) -> Adversary | None:
        if not self.args.weights.needs_generator:
            return None
        discriminator = Discriminator(
            self.args.teacher_size, feature_size(self.student.encoder), self.args.discriminator_size
        )
        return Adversary(discriminator.to(self.args.device), self.args.discriminator_learning_rate)

    def _evaluation_rows(self, dataset, args):
        if isinstance(dataset, ModalityRows) or dataset is None:
            return dataset
        return _rows("eval_dataset", dataset, self.modalities, args, labels=self.labels)

    # ---- a step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """The Trainer's; counts the rows that lack something, and hears on all ranks whether one is told to end."""
        with self.times.measure("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.rows.add(batch["row"].cpu(), batch["row_state"].cpu())
        self.stop_request.grant_if(self.ranks.gather_numbers(self.stop_request.made).any())
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted terms of a batch, see `DistillationObjective`."""
        found = model(inputs["inputs"])
        has_label, has_auxiliaries = row_masks(inputs["row_state"])
        # As a condition of generator and discriminator, at the scale that both can count on.
        found["student_features"] = standardised(found["student_features"])
        progress = self.state.global_step / max(self.state.max_steps, 1)
        loss = self.objective(found, inputs["label"], has_label, has_auxiliaries, progress, self.meter)
        self._found = {name: value.detach() for name, value in found.items()}
        self._found["has_auxiliaries"] = has_auxiliaries
        return (loss, found) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's step of everything else, then the discriminator's on the features of the same pass."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_finite(loss, "the loss", inputs["row"].cpu(), self.state.global_step, self.args.output_dir)
        if self.adversary is not None:
            accuracy = self.adversary.accumulate(
                self._discriminator_loss, 1 / self.current_gradient_accumulation_steps
            )
            self.meter.add("discriminator_accuracy", accuracy)
            if self.accelerator.sync_gradients:
                self.adversary.step()
        return loss

    def _discriminator_loss(self, discriminator):
        found = self._found
        return discriminator_loss(
            discriminator, found["real"], found["generated"], found["student_features"], found["has_auxiliaries"]
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the terms to the training logs, and look whether teacher or discriminator go astray."""
        if "loss" in logs:
            logs.update(self.meter.pop(self.ranks))
        self.watch.look(logs)
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Accuracy of student and, where the data have its modalities, of teacher and auxiliaries; R@1 of the student.

        R@1 is the share of rows whose nearest other row of the set, by the student's embeddings, is of their class.
        """
        with self.times.measure("evaluation"):
            return super().evaluate(
                self._evaluation_rows(eval_dataset, self.args), ignore_keys, metric_key_prefix=metric_key_prefix
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The student's cross-entropy; logits of all networks and the student's embeddings; labels and states."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self.model(inputs["inputs"])
        has_label, _ = row_masks(inputs["row_state"])
        losses = torch.nn.functional.cross_entropy(found["student_logits"].float(), inputs["label"], reduction="none")
        loss = losses[has_label].mean() if has_label.any() else losses.sum() * 0
        if prediction_loss_only:
            return loss, None, None
        kept = {name: value.float() for name, value in found.items() if name.endswith("_logits")}
        kept["student_embeds"] = found["student_embeds"]
        self._predicted = list(kept)
        return loss, tuple(kept.values()), (inputs["label"], inputs["row_state"])

    def _metrics(self, prediction) -> dict[str, float]:
        return prediction_metrics(
            dict(zip(self._predicted, prediction.predictions, strict=True)), *prediction.label_ids
        )

    @torch.no_grad()
    def embed(self, dataset: Columns) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's embeddings `(n, E)` of the labelled rows, and their labels int64 `(n,)`.

        Each rank computes them all.
        """
        rows = _rows("dataset", dataset, self.modalities, self.args, labels=self.labels)
        self.model.eval()
        embeds, labels = [], []
        for start in range(0, len(rows), self.args.eval_batch_size):
            chosen = range(start, min(start + self.args.eval_batch_size, len(rows)))
            batch = self._prepare_inputs(self.data_collator([rows[row] for row in chosen]))
            has_label, _ = row_masks(batch["row_state"])
            with self.compute_loss_context_manager():
                found = self.student(**batch["inputs"][self.args.student_column])
            embeds.append(found.embeds[has_label].cpu())
            labels.append(batch["label"][has_label].cpu())
        return torch.cat(embeds), torch.cat(labels)

    # ---- the run ----

    def _save_weights(self, folder: Path, output_dir: str | None, _internal_call: bool) -> None:
        """Save the student; into a checkpoint, all networks, and the student next to them."""
        if self._unfinished is not None:
            super()._save_weights(folder, output_dir, _internal_call)
            return
        if self.args.should_save:
            super().save_extra(folder)
            self._save_student(folder)
        if self.args.push_to_hub and not _internal_call:  # as the Trainer does
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def save_extra(self, folder: Path) -> None:
        """Write the recipe and the student, which has the recipe next to it as well."""
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
        """Discard the figures of an earlier call."""
        self.meter.reset()

    # ---- what a run leaves behind ----

    def final_figures(self, test_dataset: Any) -> dict[str, float]:
        """Evaluate the trained networks on `test_dataset`, by default the `eval_dataset`."""
        dataset = self.eval_dataset if test_dataset is None else test_dataset
        return {} if dataset is None else drop_speed(self.evaluate(dataset, metric_key_prefix="final"), "final")

    def check_checkpoint(self, folder: str) -> None:
        """Make sure that a checkpoint holds these networks (`ValueError`)."""
        path = Path(folder, "model.safetensors")
        if missing := [name for name in (path.name, STATE_FILE) if not Path(folder, name).is_file()]:
            raise ValueError(
                f"{folder} is not a whole checkpoint of a distillation: it has no {' and no '.join(missing)}; resume "
                "from another checkpoint."
            )
        with safe_open(path, "pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
        own = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        if differing := sorted(name for name in {*shapes, *own} if shapes.get(name) != own.get(name)):
            raise ValueError(
                f"{folder} is a checkpoint of other networks ({', '.join(differing[:3])} differ); resume with the "
                "settings that it was made with, or start anew in another output_dir."
            )


def _modalities(args, auxiliaries: Mapping[str, Any], processors: Mapping[str, Any]) -> list[str]:
    if args.weights.needs_teacher and not auxiliaries:
        raise ValueError(f"auxiliaries is empty, and method {args.method!r} learns from them; pass an encoder each.")
    modalities = [args.student_column, *(auxiliaries if args.weights.needs_teacher else ())]
    known = {args.student_column, *auxiliaries}
    if wrong := [name for name in processors if name not in known]:
        raise ValueError(f"processors: {', '.join(wrong)} is no modality; there are {', '.join(sorted(known))}.")
    if wrong := [name for name in auxiliaries if "." in name or not name]:
        raise ValueError(f"auxiliaries: {wrong[0]!r} cannot be the name of a modality; rename the column.")
    return modalities


def _rows(argument: str, dataset, modalities: Sequence[str], args, labels=None) -> ModalityRows:
    optional = modalities[1:] if labels is not None else ()
    try:
        return ModalityRows(dataset, modalities, args.label_column, labels=labels, optional=optional)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


AuxiliaryDistillationTrainer = DistillationTrainer
"""Name of the trainer in version 0.1."""
