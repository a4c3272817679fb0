"""The networks that train together: student, auxiliaries, the teacher that fuses them, and what compares them."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_dissect.distillation.student import StudentForClassification, TaskHeads, feature_size, features_of
from hf_dissect.distillation.terms import TermWeights

Inputs = Mapping[str, Mapping[str, torch.Tensor]]


class Teacher(nn.Module):
    """Fuses the features of all modalities.

    It reads the student's modality with an encoder of its own, so that what distillation gives the student comes from
    the terms of the objective alone, and the auxiliary ones by the features of their encoders, A.

    Args:
        encoder: of the student's modality.
        auxiliary_sizes: of the features of each auxiliary.
        hidden_size: of the fused features.
        num_labels, embedding_size: see `TaskHeads`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        auxiliary_sizes: list[int],
        hidden_size: int,
        num_labels: int,
        embedding_size: int | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        width = feature_size(encoder) + sum(auxiliary_sizes)
        self.fusion = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.heads = TaskHeads(hidden_size, num_labels, embedding_size)

    def forward(self, inputs: Mapping[str, torch.Tensor], auxiliary_features: list[torch.Tensor]) -> torch.Tensor:
        """Fused features `(B, hidden_size)`."""
        return self.fusion(torch.cat([features_of(self.encoder, dict(inputs)), *auxiliary_features], dim=-1))


class Comparison(nn.Module):
    """Two projections to vectors of unit length, whose cosines say which x and y belong together.

    Each has a hidden layer: the features keep what the task needs, and what tells one row from another can be found in
    them all the same (SimCLR, arXiv 2002.05709, section 4.2).
    """

    def __init__(self, x_size: int, y_size: int, size: int):
        super().__init__()
        self.x, self.y = (
            nn.Sequential(nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for width in (x_size, y_size)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, size)` each, in single precision."""
        return tuple(nn.functional.normalize(part.float(), dim=-1) for part in (self.x(x), self.y(y)))


class Generator(nn.Module):
    """Predicts the teacher's features, brought to zero mean and unit deviation, from the student's.

    Nothing in it is normalised: that would divide by the small deviations of the beginning, and the gradient that
    reaches the student would drown that of its task.
    """

    def __init__(self, student_size: int, teacher_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(student_size, 2 * teacher_size),
            nn.GELU(),
            nn.Linear(2 * teacher_size, teacher_size),
        )

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        return self.layers(student).float()


class DistillationNetworks(nn.Module):
    """All networks of a run in one module, for one forward pass, one optimiser and one checkpoint.

    Only what the weights ask for is built. The student's heads are made first: whatever the method, a seed starts with
    the same student.

    Args:
        student: with its heads.
        auxiliaries: encoder of each auxiliary modality, A.
        weights: of the terms.
        teacher_size: of the fused features.
        comparison_size: of the vectors that the information terms compare.
        student_modality: name of the student's inputs.
        teacher_learns: whether the information terms train the teacher as well.
        classifies, retrieves: the parts that task losses have.
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
    ):
        super().__init__()
        self.student = student
        self.student_modality = student_modality
        self.weights = weights
        self.teacher_learns = teacher_learns
        self.teacher = None
        self._tasks = {"logits": classifies, "embeds": retrieves}
        if not weights.needs_teacher:
            return
        config = student.config
        student_size = feature_size(student.encoder)
        self.auxiliaries = nn.ModuleDict(dict(auxiliaries))
        sizes = {name: feature_size(encoder) for name, encoder in auxiliaries.items()}
        encoder = copy.deepcopy(student.encoder)
        heads = (config.num_labels, config.embedding_size)
        self.teacher = Teacher(encoder, list(sizes.values()), teacher_size, *heads)
        if weights.auxiliary_task:
            self.auxiliary_heads = nn.ModuleDict({name: TaskHeads(size, *heads) for name, size in sizes.items()})
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
        return self.student.dtype

    def activation_checkpointing_enable(self, **options) -> None:
        """Make the encoders save memory for time, those that can; `options` are those of `PreTrainedModel`.

        Raises:
            ValueError: none of them can.
        """
        encoders = [part for part in self.modules() if isinstance(part, PreTrainedModel) and part is not self.student]
        able = [encoder for encoder in encoders if encoder.supports_gradient_checkpointing]
        if not able:
            raise ValueError(
                "gradient_checkpointing: no encoder can do it; leave it out, or take encoders such as a CLIP's towers."
            )
        for encoder in able:
            encoder.activation_checkpointing_enable(**options)

    def forward(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """One pass through everything that the objective and the evaluation look at.

        Args:
            inputs: of each modality, the keywords of its encoder; without the auxiliary ones, the student runs alone.

        Returns:
            Logits `(B, C)`, embeddings `(B, E)` and features `(B, D)` of `student` and, where there is a teacher, of
            `teacher` and each `auxiliary.NAME`, as `NAME_logits` and so on; `compared_student` and
            `compared_auxiliary.NAME` `(2, B, size)`, the teacher's vectors first; `generated` and `real` `(B, D)`.
        """
        student = self.student(**inputs[self.student_modality])
        found = {f"student_{name}": student[name] for name in ("logits", "embeds", "features")}
        if self.teacher is None or any(name not in inputs for name in self.auxiliaries):
            return self._only_with_gradient_what_trains(found)
        features = {name: features_of(encoder, dict(inputs[name])) for name, encoder in self.auxiliaries.items()}
        teacher = self.teacher(inputs[self.student_modality], list(features.values()))
        logits, embeds = self.teacher.heads(teacher)
        found |= {"teacher_logits": logits, "teacher_embeds": embeds, "teacher_features": teacher}
        for name, values in features.items():
            found[f"auxiliary.{name}_features"] = values
            if self.weights.auxiliary_task:
                logits, embeds = self.auxiliary_heads[name](values)
                found |= {f"auxiliary.{name}_logits": logits, f"auxiliary.{name}_embeds": embeds}
        return self._only_with_gradient_what_trains(found) | self._comparisons(student.features, teacher, features)

    def _only_with_gradient_what_trains(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # DDP waits for the gradients of all that an output was made of.
        weights = {"student": self.weights.student_task, "teacher": self.weights.teacher_task}
        kept = {}
        for name, value in found.items():
            network, _, kind = name.rpartition("_")
            trains = weights.get(network, self.weights.auxiliary_task) and self._tasks.get(kind, False)
            trains = trains or (name == "student_logits" and self.weights.hinton)
            kept[name] = value if trains else value.detach()
        return kept

    def _comparisons(
        self, student: torch.Tensor, teacher: torch.Tensor, auxiliaries: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        found = {}
        if self.weights.information_student or self.weights.contrastive:
            learns = self.weights.information_student and self.teacher_learns
            seen = teacher if learns else teacher.detach()
            found["compared_student"] = torch.stack(self.student_comparison(seen, student))
        if self.weights.information_auxiliary:
            seen = teacher if self.teacher_learns else teacher.detach()
            for name, values in auxiliaries.items():
                found[f"compared_auxiliary.{name}"] = torch.stack(self.auxiliary_comparisons[name](seen, values))
        if self.weights.needs_generator:
            found["generated"] = self.generator(student)
            found["real"] = standardised(teacher.detach())
        return found


def standardised(features: torch.Tensor) -> torch.Tensor:
    """Each row of `(B, D)` at zero mean and unit deviation, in single precision: no scale tells whose it is."""
    return nn.functional.layer_norm(features.float(), features.shape[-1:])
