"""Terms of the objective with their weights, and methods as sets of terms."""

from dataclasses import asdict, dataclass, fields, replace

TASK_TERMS = ("student_task", "teacher_task", "auxiliary_task")


@dataclass(frozen=True)
class TermWeights:
    """Weights of the terms; a term of weight 0 is not computed, and the networks that only it needs are not built.

    S is the student, T the teacher and A an auxiliary.

    Attributes:
        student_task: Weight of the task loss of S.
        teacher_task: Weight of the task loss of T.
        auxiliary_task: Weight of the task loss of A, the mean over the auxiliaries.
        information_student: Weight of -I(T;S), estimated by the InfoNCE bound.
        information_auxiliary: Weight of -I(T;A), estimated by the InfoNCE bound, the mean over the auxiliaries.
        conditional_entropy: Weight of H(T|S), estimated by a generator against a discriminator.
        hinton: Weight of the Kullback-Leibler divergence of the softened predictions of S from those of T. It bounds
            what S tells of the answers of T (Barber and Agakov, 2003), as `information_student` does for its features.
        contrastive: Weight of the InfoNCE loss of S against T, without gradient to T (in the style of CRD).
    """

    student_task: float = 1.0
    teacher_task: float = 0.0
    auxiliary_task: float = 0.0
    information_student: float = 0.0
    information_auxiliary: float = 0.0
    conditional_entropy: float = 0.0
    hinton: float = 0.0
    contrastive: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """True if any term other than the student's own task has a weight."""
        return any(value for name, value in asdict(self).items() if name != "student_task")

    @property
    def needs_generator(self) -> bool:
        """True if the conditional entropy has a weight."""
        return self.conditional_entropy > 0


TERMS = tuple(field.name for field in fields(TermWeights))

_TEACHER = TermWeights(teacher_task=1.0, auxiliary_task=1.0)
METHODS = {
    "student": TermWeights(),
    "hinton": replace(_TEACHER, hinton=0.3),
    "crd": replace(_TEACHER, contrastive=0.3),
    "mi_student_only": replace(_TEACHER, information_student=0.3),
    "amid": replace(_TEACHER, information_student=0.3, information_auxiliary=0.1, conditional_entropy=0.1, hinton=0.3),
}
"""Weights of the terms of each method, as in the results of `benchmarks/distillation.py`."""
