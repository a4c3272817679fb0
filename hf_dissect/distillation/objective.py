"""Loss of a batch: the weighted terms that train student, teacher and auxiliaries."""

from collections.abc import Mapping
from typing import cast

import torch

from hf_dissect.distillation.diagnostics import Meter
from hf_dissect.distillation.losses.conditional_entropy import Adversary, anchor_loss, generator_loss
from hf_dissect.distillation.losses.mutual_information import InformationEstimate, MemoryBank, information_loss
from hf_dissect.distillation.losses.task import classification_loss, hinton_loss, retrieval_loss
from hf_dissect.distillation.training_args import DistillationTrainingArguments

Outputs = dict[str, torch.Tensor]
"""Outputs of `DistillationNetworks`."""


class DistillationObjective:
    """Weighted sum of the terms of a distillation.

    It maximises I(T;S) and I(T;A), minimises H(T|S), and lets teacher T, student S and auxiliaries A learn the task.
    This is a reconstruction from the paper's abstract, made without its equations, and may differ from them (AMID,
    arXiv 2306.07646). `TermWeights` lists the terms and `METHODS` those of each method.

    Args:
        args: Arguments of the run.
        adversary: Discriminator for the conditional entropy; None if that term has no weight.

    Attributes:
        banks: Memory bank of each information term, by the name of its compared vectors.
    """

    def __init__(self, args: DistillationTrainingArguments, adversary: Adversary | None) -> None:
        self.args = args
        self.weights = args.weights
        self.adversary = adversary
        self.banks: dict[str, MemoryBank] = {}

    def __call__(
        self,
        outputs: Outputs,
        label: torch.Tensor,
        has_label: torch.Tensor,
        has_auxiliaries: torch.Tensor,
        progress: float,
        meter: Meter,
    ) -> torch.Tensor:
        """Compute the loss of a batch of `B` rows.

        Args:
            outputs: Outputs of `DistillationNetworks`, with the student's features at unit deviation.
            label: Classes, int64 `(B,)`; any class where the label is missing.
            has_label: Mask of the rows that train the student's task, bool `(B,)`.
            has_auxiliaries: Mask of the rows that train the terms of distillation, bool `(B,)`. Those with a label
                train the tasks of teacher and auxiliaries as well.
            progress: Share of the run that is done, in [0, 1].
            meter: Meter to which the figures of the terms are added.

        Returns:
            A scalar with gradient, whose average over the ranks is the loss of all rows.
        """
        terms = {"student_task": (self.weights.student_task, self._compute_task(outputs, "student", label, has_label))}
        self._measure_accuracy(outputs, "student", label, has_label, meter)
        if "teacher_logits" in outputs:
            rise = self._compute_rise(progress)
            terms |= self._compute_teaching_tasks(outputs, label, has_label & has_auxiliaries, meter)
            terms |= {
                name: (rise * getattr(self.weights, name), loss)
                for name, loss in self._compute_distillation(outputs, has_auxiliaries, meter).items()
            }
        for name, (_, loss) in terms.items():
            meter.add(f"loss_{name}", loss)
        return _add([weight * loss for weight, loss in terms.values()])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the vectors of the memory banks, by name."""
        return {name: bank.vectors for name, bank in self.banks.items() if bank.vectors is not None}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue with saved memory banks; they are ignored if the arguments ask for none."""
        for name, vectors in state.items() if self.args.memory_bank else ():
            self.banks.setdefault(name, MemoryBank(self.args.memory_bank)).vectors = vectors

    def _compute_rise(self, progress: float) -> float:
        """Return the factor in [0, 1] by which the weights of distillation have risen."""
        warmup = self.args.weight_warmup
        return 1.0 if progress >= warmup else progress / warmup

    def _compute_teaching_tasks(
        self, outputs: Outputs, label: torch.Tensor, complete: torch.Tensor, meter: Meter
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Return weight and loss of the tasks of teacher and auxiliaries, over complete rows."""
        weights = self.weights
        terms: dict[str, tuple[float, torch.Tensor]] = {}
        self._measure_accuracy(outputs, "teacher", label, complete, meter)
        if weights.teacher_task:
            terms["teacher_task"] = (weights.teacher_task, self._compute_task(outputs, "teacher", label, complete))
        if weights.auxiliary_task:
            names = [
                name.removesuffix("_logits")
                for name in outputs
                if name.startswith("auxiliary.") and name.endswith("_logits")
            ]
            for name in names:
                self._measure_accuracy(outputs, name, label, complete, meter)
            losses = [self._compute_task(outputs, name, label, complete) for name in names]
            terms["auxiliary_task"] = (weights.auxiliary_task, _add(losses) / len(losses))
        return terms

    def _compute_distillation(self, outputs: Outputs, counted: torch.Tensor, meter: Meter) -> dict[str, torch.Tensor]:
        """Return the loss of each term of distillation that has a weight."""
        weights = self.weights
        terms: dict[str, torch.Tensor] = {}
        if weights.hinton:
            terms["hinton"] = hinton_loss(
                outputs["student_logits"], outputs["teacher_logits"], counted, self.args.hinton_temperature
            )
        if weights.information_student or weights.contrastive:
            estimate = self._estimate_information(outputs, "compared_student", counted)
            meter.add("information_student", estimate.bound)
            for name in ("information_student", "contrastive"):
                if getattr(weights, name):
                    terms[name] = estimate.loss
        if weights.information_auxiliary:
            names = [name for name in outputs if name.startswith("compared_auxiliary.")]
            estimates = [self._estimate_information(outputs, name, counted) for name in names]
            bounds, losses = [part.bound for part in estimates], [part.loss for part in estimates]
            meter.add("information_auxiliary", _add(bounds) / len(bounds))
            terms["information_auxiliary"] = _add(losses) / len(losses)
        if weights.conditional_entropy:
            terms["conditional_entropy"] = self._compute_conditional_entropy(outputs, counted, meter)
        return terms

    def _compute_conditional_entropy(self, outputs: Outputs, counted: torch.Tensor, meter: Meter) -> torch.Tensor:
        with cast(Adversary, self.adversary).frozen() as discriminator:
            deception = generator_loss(discriminator, outputs["generated"], outputs["student_features"], counted)
        error = anchor_loss(outputs["generated"], outputs["real"], counted)
        meter.add("generator_error", error)
        return deception + self.args.generator_anchor * error

    def _estimate_information(self, outputs: Outputs, name: str, counted: torch.Tensor) -> InformationEstimate:
        bank = self.banks.setdefault(name, MemoryBank(self.args.memory_bank)) if self.args.memory_bank else None
        estimate = information_loss(outputs[name], counted, self.args.temperature, bank)
        if bank is not None and outputs[name].requires_grad:
            bank.add(estimate.pairs)
        return estimate

    def _compute_task(self, outputs: Outputs, name: str, label: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        args, parts = self.args, []
        if args.classification_weight:
            loss = classification_loss(outputs[f"{name}_logits"], label, counted, args.label_smoothing)
            parts.append(args.classification_weight * loss)
        if args.retrieval_weight:
            loss = retrieval_loss(outputs[f"{name}_embeds"], label, counted, args.retrieval_temperature)
            parts.append(args.retrieval_weight * loss)
        return _add(parts)

    def _measure_accuracy(
        self, outputs: Outputs, name: str, label: torch.Tensor, counted: torch.Tensor, meter: Meter
    ) -> None:
        if self.args.classification_weight:
            right = (outputs[f"{name}_logits"].detach().argmax(-1) == label) & counted
            meter.add(f"{name.replace('.', '_')}_accuracy", right.sum(), counted.sum())


def _add(losses: list[torch.Tensor]) -> torch.Tensor:
    """Add scalars, of which there is at least one."""
    return cast(torch.Tensor, sum(losses))
