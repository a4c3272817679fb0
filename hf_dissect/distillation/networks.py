"""Networks that train together: student, auxiliary encoders, the teacher that fuses them, and their comparisons."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_dissect.distillation.comparisons import Comparison, Generator
from hf_dissect.distillation.student import (
    StudentForClassification,
    TaskHeads,
    extract_features,
    find_feature_size,
)
from hf_dissect.distillation.terms import TermWeights
from hf_dissect.distillation.training_args import DistillationTrainingArguments

Inputs = Mapping[str, Mapping[str, torch.Tensor]]
"""Arguments of the encoders, by modality."""


class Teacher(nn.Module):
    """Network that fuses the features of all modalities.

    It reads the student's modality with an encoder of its own, so that the student learns from it through the terms
    of the objective only. It reads the auxiliary modalities through the features of their encoders.

    Args:
        encoder: Encoder of the student's modality.
        auxiliary_sizes: Size of the features of each auxiliary encoder.
        hidden_size: Size of the fused features.
        num_labels: Number of classes.
        embedding_size: Size of the embeddings; None to use the features themselves.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        auxiliary_sizes: list[int],
        hidden_size: int,
        num_labels: int,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        width = find_feature_size(encoder) + sum(auxiliary_sizes)
        self.fusion = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.heads = TaskHeads(hidden_size, num_labels, embedding_size)

    def forward(
        self, inputs: Mapping[str, torch.Tensor], auxiliary_features: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse the features of `B` rows.

        Args:
            inputs: Arguments of the encoder of the student's modality.
            auxiliary_features: Features of each auxiliary encoder, `(B, size)`.

        Returns:
            Features `(B, size)` of the student's modality, and fused features `(B, hidden_size)`.
        """
        own = extract_features(self.encoder, dict(inputs))
        return own, self.fuse(own, auxiliary_features)

    def fuse(self, own: torch.Tensor, auxiliary_features: list[torch.Tensor]) -> torch.Tensor:
        """Fuse features of the student's modality `(B, size)` with those of the auxiliaries."""
        return self.fusion(torch.cat([own, *auxiliary_features], dim=-1))


class DistillationNetworks(nn.Module):
    """All networks of a run in one module, for one forward pass, one optimiser and one checkpoint.

    Networks are built only for terms that have a weight. The student's heads are built first, so that for a given seed
    all methods start with the same student.

    Args:
        student: Student with its heads.
        auxiliaries: Encoder of each auxiliary modality, by column.
        weights: Weights of the terms.
        student_modality: Column of the student's modality.
        teacher_size: Size of the teacher's features.
        comparison_size: Size of the vectors that the information terms compare.
        teacher_learns: True if the information terms train the teacher as well.
        compares_auxiliaries: True if the student is compared with what the teacher makes of the auxiliaries alone.
        standardises: True if features are standardised over the rows before they are compared.
        classifies: True if the task losses include classification.
        retrieves: True if the task losses include retrieval.
    """

    def __init__(
        self,
        student: StudentForClassification,
        auxiliaries: Mapping[str, PreTrainedModel],
        weights: TermWeights,
        *,
        student_modality: str,
        teacher_size: int = 128,
        comparison_size: int = 64,
        teacher_learns: bool = True,
        compares_auxiliaries: bool = False,
        standardises: bool = True,
        classifies: bool = True,
        retrieves: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.student_modality = student_modality
        self.weights = weights
        self.teacher_learns = teacher_learns
        self.compares_auxiliaries = compares_auxiliaries
        self.teacher = None
        self._tasks = {"logits": classifies, "embeds": retrieves}
        if not weights.needs_teacher:
            return
        student_size = find_feature_size(student.encoder)
        self.auxiliaries = nn.ModuleDict(dict(auxiliaries))
        sizes = {name: find_feature_size(encoder) for name, encoder in auxiliaries.items()}
        encoder = copy.deepcopy(student.encoder)
        num_labels, embedding_size = cast(int, student.config.num_labels), student.config.embedding_size
        self.teacher = Teacher(encoder, list(sizes.values()), teacher_size, num_labels, embedding_size)
        if weights.auxiliary_task:
            self.auxiliary_heads = nn.ModuleDict(
                {name: TaskHeads(size, num_labels, embedding_size) for name, size in sizes.items()}
            )
        if weights.information_student or weights.contrastive:
            self.student_comparison = Comparison(
                teacher_size, student_size, comparison_size, standardises=standardises
            )
        if weights.information_auxiliary:
            self.auxiliary_comparisons = nn.ModuleDict(
                {
                    name: Comparison(teacher_size, size, comparison_size, standardises=standardises)
                    for name, size in sizes.items()
                }
            )
        if weights.needs_generator:
            self.generator = Generator(student_size, teacher_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the student's weights."""
        return self.student.dtype

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Make the encoders that can do it save memory at the cost of time.

        Args:
            **options: Arguments of `PreTrainedModel.activation_checkpointing_enable`.

        Raises:
            ValueError: No encoder can do it.
        """
        encoders = [part for part in self.modules() if isinstance(part, PreTrainedModel) and part is not self.student]
        able = [encoder for encoder in encoders if encoder.supports_gradient_checkpointing]
        if not able:
            raise ValueError(
                "gradient_checkpointing: no encoder can do it; leave it out, or use encoders such as the towers of "
                "CLIP."
            )
        for encoder in able:
            encoder.activation_checkpointing_enable(**options)

    def forward(self, inputs: Inputs, counted: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Compute everything that the objective and the evaluation read, in one pass over `B` rows.

        Args:
            inputs: Arguments of each encoder, by modality. Without an auxiliary modality, the student runs alone.
            counted: Mask of the rows that are compared, bool `(B,)`; None for all.

        Returns:
            `NAME_logits` `(B, C)`, `NAME_embeds` `(B, E)` and `NAME_features` `(B, D)`, where NAME is `student` and,
            if there is a teacher, `teacher` and each `auxiliary.COLUMN`. `compared_student` and
            `compared_auxiliary.COLUMN` `(2, B, size)`, the teacher's vectors first. `generated` and `real` `(B, D)`.
        """
        student = self.student(**inputs[self.student_modality])
        outputs = {f"student_{name}": student[name] for name in ("logits", "embeds", "features")}
        if self.teacher is None or any(name not in inputs for name in self.auxiliaries):
            return self._detach_untrained(outputs)
        features = {name: extract_features(encoder, dict(inputs[name])) for name, encoder in self.auxiliaries.items()}
        own, teacher = self.teacher(inputs[self.student_modality], list(features.values()))
        taught = teacher
        if self.compares_auxiliaries:  # the own modality would be a short cut; times 0, DDP finds all weights used
            taught = self.teacher.fuse(0 * own, list(features.values()))
        logits, embeds = self.teacher.heads(teacher)
        outputs |= {"teacher_logits": logits, "teacher_embeds": embeds, "teacher_features": teacher}
        for name, values in features.items():
            outputs[f"auxiliary.{name}_features"] = values
            if self.weights.auxiliary_task:
                logits, embeds = self.auxiliary_heads[name](values)
                outputs |= {f"auxiliary.{name}_logits": logits, f"auxiliary.{name}_embeds": embeds}
        return self._detach_untrained(outputs) | self._compare(student.features, taught, teacher, features, counted)

    def _detach_untrained(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Detach the outputs that no term trains: DDP waits for a gradient of every weight behind an output."""
        weights = {"student": self.weights.student_task, "teacher": self.weights.teacher_task}
        kept = {}
        for name, value in outputs.items():
            network, _, kind = name.rpartition("_")
            trains = weights.get(network, self.weights.auxiliary_task) and self._tasks.get(kind, False)
            trains = trains or (name == "student_logits" and self.weights.hinton)
            kept[name] = value if trains else value.detach()
        return kept

    def _compare(
        self,
        student: torch.Tensor,
        taught: torch.Tensor,
        teacher: torch.Tensor,
        auxiliaries: dict[str, torch.Tensor],
        counted: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Compute the inputs of the terms that compare features `(B, D)`; the student learns from those `taught`."""
        outputs = {}
        if self.weights.information_student or self.weights.contrastive:
            learns = self.weights.information_student and self.teacher_learns
            seen = taught if learns else taught.detach()
            outputs["compared_student"] = torch.stack(self.student_comparison(seen, student, counted))
        if self.weights.information_auxiliary:
            seen = teacher if self.teacher_learns else teacher.detach()
            for name, values in auxiliaries.items():
                vectors = self.auxiliary_comparisons[name](seen, values, counted)
                outputs[f"compared_auxiliary.{name}"] = torch.stack(vectors)
        if self.weights.needs_generator:
            outputs["generated"] = self.generator(student)
            outputs["real"] = standardise_rows(taught.detach())
        return outputs


def build_networks(
    model: PreTrainedModel,
    auxiliaries: Mapping[str, PreTrainedModel],
    labels: list[str],
    args: DistillationTrainingArguments,
) -> DistillationNetworks:
    """Build the networks of a run.

    Args:
        model: Encoder of the student, or a `StudentForClassification`.
        auxiliaries: Encoder of each auxiliary modality, by column.
        labels: Names of the classes.
        args: Arguments of the run.

    Raises:
        ValueError: A student has another number of classes.
    """
    student = model
    if not isinstance(student, StudentForClassification):
        student = StudentForClassification.of(model, labels, args.embedding_size)
    elif student.config.num_labels != len(labels):
        raise ValueError(
            f"model has {student.config.num_labels} classes and the training data have {len(labels)}; pass its "
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
        compares_auxiliaries=args.compares_auxiliaries,
        standardises=args.standardise_compared,
        classifies=args.classification_weight > 0,
        retrieves=args.retrieval_weight > 0,
    )


def standardise_rows(features: torch.Tensor) -> torch.Tensor:
    """Bring each row of `(B, D)` to zero mean and unit deviation, in single precision.

    At one common scale, the discriminator cannot recognise the teacher's features by their size.
    """
    return nn.functional.layer_norm(features.float(), features.shape[-1:])
