"""The names and weights of the terms of the objective, and the sets of them that stand for methods."""

from dataclasses import asdict, dataclass, fields, replace

TASK_TERMS = ("student_task", "teacher_task", "auxiliary_task")


@dataclass(frozen=True)
class TermWeights:
    """Weight of each term; a term of weight 0 is not computed, and networks that only it needs are not built.

    Attributes:
        student_task, teacher_task, auxiliary_task: Task losses of S, T and A.
        information_student: -I(T;S), by its InfoNCE bound.
        information_auxiliary: -I(T;A), likewise, the mean over the auxiliary modalities.
        conditional_entropy: H(T|S), adversarially.
        hinton: Kullback-Leibler divergence of the softened predictions, with those of the teacher for a target.
        contrastive: InfoNCE loss of S against T, without gradient to T (in the style of CRD).
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
        """True where any term but the student's own task looks at teacher or auxiliary."""
        return any(value for name, value in asdict(self).items() if name != "student_task")

    @property
    def needs_generator(self) -> bool:
        """True where the conditional entropy has a weight."""
        return self.conditional_entropy > 0


TERMS = tuple(field.name for field in fields(TermWeights))

_TEACHER = TermWeights(teacher_task=1.0, auxiliary_task=1.0)
METHODS = {
    "student": TermWeights(),
    "hinton": replace(_TEACHER, hinton=0.3),
    "crd": replace(_TEACHER, contrastive=0.3),
    "mi_student_only": replace(_TEACHER, information_student=0.3),
    "amid": replace(_TEACHER, information_student=0.3, information_auxiliary=0.3, conditional_entropy=0.2),
}
"""Each method as the terms that make it, with the weights of the figures of `benchmarks/amid_utd_mhad.py`."""
