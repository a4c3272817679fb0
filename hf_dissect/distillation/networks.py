"""Networks that train together: student, auxiliary encoders, the teacher that fuses them, and their comparisons."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

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

    def forward(self, inputs: Mapping[str, torch.Tensor], auxiliary_features: list[torch.Tensor]) -> torch.Tensor:
        """Fuse the features of `B` rows.

        Args:
            inputs: Arguments of the encoder of the student's modality.
            auxiliary_features: Features of each auxiliary encoder, `(B, size)`.

        Returns:
            Fused features `(B, hidden_size)`.
        """
        return self.fusion(torch.cat([extract_features(self.encoder, dict(inputs)), *auxiliary_features], dim=-1))


class Comparison(nn.Module):
    """Two projections to vectors of unit length, whose cosines are high for an x and a y of the same row.

    Each projection has a hidden layer, so that the features may keep what the task needs even though the vectors have
    to separate all rows (SimCLR, arXiv 2002.05709, section 4.2).

    Args:
        x_size: Size of the x.
        y_size: Size of the y.
        size: Size of the vectors.
    """

    def __init__(self, x_size: int, y_size: int, size: int) -> None:
        super().__init__()
        self.x, self.y = (
            nn.Sequential(nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for width in (x_size, y_size)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project x `(B, x_size)` and y `(B, y_size)` to vectors `(B, size)` each, in single precision."""
        normalize = nn.functional.normalize
        return normalize(self.x(x).float(), dim=-1), normalize(self.y(y).float(), dim=-1)


class Generator(nn.Module):
    """Network that predicts the teacher's features, at zero mean and unit deviation, from the student's.

    It normalises nothing: normalisation would divide by the small deviations at the start, and the gradient that
    reaches the student would drown that of its task.

    Args:
        student_size: Size of the student's features.
        teacher_size: Size of the teacher's features.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(student_size, 2 * teacher_size),
            nn.GELU(),
            nn.Linear(2 * teacher_size, teacher_size),
        )

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        """Predict features `(B, teacher_size)` from the student's `(B, student_size)`, in single precision."""
        return self.layers(student).float()


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
        classifies: bool = True,
        retrieves: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.student_modality = student_modality
        self.weights = weights
        self.teacher_learns = teacher_learns
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
            self.student_comparison = Comparison(teacher_size, student_size, comparison_size)
        if weights.information_auxiliary:
            self.auxiliary_comparisons = nn.ModuleDict(
                {name: Comparison(teacher_size, size, comparison_size) for name, size in sizes.items()}
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

    def forward(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Compute everything that the objective and the evaluation read, in one pass over `B` rows.

        Args:
            inputs: Arguments of each encoder, by modality. Without an auxiliary modality, the student runs alone.

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
        teacher = self.teacher(inputs[self.student_modality], list(features.values()))
        logits, embeds = self.teacher.heads(teacher)
        outputs |= {"teacher_logits": logits, "teacher_embeds": embeds, "teacher_features": teacher}
        for name, values in features.items():
            outputs[f"auxiliary.{name}_features"] = values
            if self.weights.auxiliary_task:
                logits, embeds = self.auxiliary_heads[name](values)
                outputs |= {f"auxiliary.{name}_logits": logits, f"auxiliary.{name}_embeds": embeds}
        return self._detach_untrained(outputs) | self._compare(student.features, teacher, features)

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
        self, student: torch.Tensor, teacher: torch.Tensor, auxiliaries: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Compute the inputs of the terms that compare features `(B, D)`."""
        outputs = {}
        if self.weights.information_student or self.weights.contrastive:
            learns = self.weights.information_student and self.teacher_learns
            seen = teacher if learns else teacher.detach()
            outputs["compared_student"] = torch.stack(self.student_comparison(seen, student))
        if self.weights.information_auxiliary:
            seen = teacher if self.teacher_learns else teacher.detach()
            for name, values in auxiliaries.items():
                outputs[f"compared_auxiliary.{name}"] = torch.stack(self.auxiliary_comparisons[name](seen, values))
        if self.weights.needs_generator:
            outputs["generated"] = self.generator(student)
            outputs["real"] = standardise_rows(teacher.detach())
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
        classifies=args.classification_weight > 0,
        retrieves=args.retrieval_weight > 0,
    )


def standardise_rows(features: torch.Tensor) -> torch.Tensor:
    """Bring each row of `(B, D)` to zero mean and unit deviation, in single precision.

    At one common scale, the discriminator cannot recognise the teacher's features by their size.
    """
    return nn.functional.layer_norm(features.float(), features.shape[-1:])
