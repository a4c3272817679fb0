"""The loss of a batch: the weighted terms that teach student, teacher and auxiliaries."""

import torch

from hf_dissect.distillation.diagnostics import Meter
from hf_dissect.distillation.losses.conditional_entropy import Adversary, anchor_loss, generator_loss
from hf_dissect.distillation.losses.mutual_information import InformationEstimate, MemoryBank, information_loss
from hf_dissect.distillation.losses.task import classification_loss, hinton_loss, retrieval_loss
from hf_dissect.distillation.training_args import AuxiliaryDistillationArguments

Outputs = dict[str, torch.Tensor]


class DistillationObjective:
    """Weighted sum of the terms; figures of each go to a meter.

    This is a reconstruction from the paper's abstract, made without its equations, which may differ (AMID,
    arXiv 2306.07646): maximise I(T;S) and I(T;A), minimise H(T|S), and let T, S and A learn the task. `TermWeights`
    has the terms and `METHODS` those of each method.

    Args:
        args: of the trainer.
        adversary: for the conditional entropy; None where that term is off.

    Attributes:
        banks: a `MemoryBank` for each information term, by the name of its compared vectors.
    """

    def __init__(self, args: AuxiliaryDistillationArguments, adversary: Adversary | None):
        self.args = args
        self.weights = args.weights
        self.adversary = adversary
        self.banks: dict[str, MemoryBank] = {}

    def __call__(
        self,
        found: Outputs,
        label: torch.Tensor,
        has_label: torch.Tensor,
        has_auxiliaries: torch.Tensor,
        progress: float,
        meter: Meter,
    ) -> torch.Tensor:
        """Loss of a batch of `B` rows.

        Args:
            found: of `DistillationNetworks`.
            label: int64 `(B,)`; anything where there is none.
            has_label: bool `(B,)`, rows that can train the student's task.
            has_auxiliaries: bool `(B,)`, rows that can train the terms of distillation; with a label, the tasks of
                teacher and auxiliaries as well.
            progress: share of the run that is done, in [0, 1].
            meter: takes in the figures.

        Returns:
            A scalar with gradient whose average over the ranks is the loss of the union of their rows.
        """
        terms = {"student_task": (self.weights.student_task, self._task(found, "student", label, has_label))}
        self._accuracy(found, "student", label, has_label, meter)
        if "teacher_logits" in found:
            rising = self._rise(progress)
            terms |= self._teaching_tasks(found, label, has_label & has_auxiliaries, meter)
            terms |= {
                name: (rising * getattr(self.weights, name), loss)
                for name, loss in self._distillation(found, has_auxiliaries, meter).items()
            }
        for name, (_, loss) in terms.items():
            meter.add(f"loss_{name}", loss)
        return sum(weight * loss for weight, loss in terms.values())

    def _rise(self, progress: float) -> float:
        warmup = self.args.weight_warmup
        return 1.0 if progress >= warmup else progress / warmup

    def _teaching_tasks(self, found, label, complete, meter) -> dict[str, tuple[float, torch.Tensor]]:
        weights, terms = self.weights, {}
        self._accuracy(found, "teacher", label, complete, meter)
        if weights.teacher_task:
            terms["teacher_task"] = (weights.teacher_task, self._task(found, "teacher", label, complete))
        if weights.auxiliary_task:
            names = [
                name.removesuffix("_logits")
                for name in found
                if name.startswith("auxiliary.") and name.endswith("_logits")
            ]
            for name in names:
                self._accuracy(found, name, label, complete, meter)
            losses = [self._task(found, name, label, complete) for name in names]
            terms["auxiliary_task"] = (weights.auxiliary_task, sum(losses) / len(losses))
        return terms

    def _distillation(self, found, counted, meter) -> dict[str, torch.Tensor]:
        weights, terms = self.weights, {}
        if weights.hinton:
            terms["hinton"] = hinton_loss(
                found["student_logits"], found["teacher_logits"], counted, self.args.hinton_temperature
            )
        if weights.information_student or weights.contrastive:
            estimate = self._information(found, "compared_student", counted)
            meter.add("information_student", estimate.bound)
            for name in ("information_student", "contrastive"):
                if getattr(weights, name):
                    terms[name] = estimate.loss
        if weights.information_auxiliary:
            names = [name for name in found if name.startswith("compared_auxiliary.")]
            estimates = [self._information(found, name, counted) for name in names]
            meter.add("information_auxiliary", sum(estimate.bound for estimate in estimates) / len(estimates))
            terms["information_auxiliary"] = sum(estimate.loss for estimate in estimates) / len(estimates)
        if weights.conditional_entropy:
            terms["conditional_entropy"] = self._conditional_entropy(found, counted, meter)
        return terms

    def _conditional_entropy(self, found: Outputs, counted: torch.Tensor, meter: Meter) -> torch.Tensor:
        with self.adversary.fixed() as discriminator:
            deception = generator_loss(discriminator, found["generated"], found["student_features"], counted)
        error = anchor_loss(found["generated"], found["real"], counted)
        meter.add("generator_error", error)
        return deception + self.args.generator_anchor * error

    def _information(self, found: Outputs, name: str, counted: torch.Tensor) -> InformationEstimate:
        bank = self.banks.setdefault(name, MemoryBank(self.args.memory_bank)) if self.args.memory_bank else None
        estimate = information_loss(found[name], counted, self.args.temperature, bank)
        if bank is not None and found[name].requires_grad:
            bank.add(estimate.pairs)
        return estimate

    def _task(self, found: Outputs, name: str, label: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        args, parts = self.args, []
        if args.classification_weight:
            loss = classification_loss(found[f"{name}_logits"], label, counted, args.label_smoothing)
            parts.append(args.classification_weight * loss)
        if args.retrieval_weight:
            loss = retrieval_loss(found[f"{name}_embeds"], label, counted, args.retrieval_temperature)
            parts.append(args.retrieval_weight * loss)
        return sum(parts)

    def _accuracy(self, found: Outputs, name: str, label: torch.Tensor, counted: torch.Tensor, meter: Meter) -> None:
        if self.args.classification_weight:
            right = (found[f"{name}_logits"].detach().argmax(-1) == label) & counted
            meter.add(f"{name.replace('.', '_')}_accuracy", right.sum(), counted.sum())
