"""What a run minimises: the contrastive loss or, with soft labels, GSC's; and the decorrelation of a MoLA router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import GscLoss, gsc_evidence
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.soft_labels import SoftLabels
from hf_dissect.task_routing import Decorrelation


@dataclass
class GscObjective:
    """The loss of GSC (CVPR 2024, arXiv 2405.16996), and the soft labels that it weights the pairs with.

    In each training step the evidence for a pair, its agreement and its structure, is recorded from the training
    forward; from it the labels are renewed once an epoch.

    Args:
        gamma: weight of the loss within the modalities.
        beta: share of the new evidence in a label, in (0, 1].
        temperature: of the softmax over the cosines; the model's own is neither used nor trained by this loss.
        warmup_epochs: epochs that train by the contrastive loss while evidence is recorded.
        masked: whether the labels weight the columns of the structures that the evidence comes from, as in the paper.
        scaling: of the structures to [0, 1] before the mixture is fitted, "min-max" (the paper's) or "quantile".
        seed: of the mixture.

    Raises:
        ValueError: a value is impossible.
    """

    columns: ClassVar[tuple[str, ...]] = SoftLabels.columns

    gamma: float = 0.01
    beta: float = 0.7
    temperature: float = 0.07
    warmup_epochs: int = 1
    masked: bool = True
    scaling: str = "min-max"
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r}: must be an integer of at least 0.")
        if not isinstance(self.masked, bool):
            raise ValueError(f"masked={self.masked!r}: must be true or false.")
        self._last_evidence: dict[str, torch.Tensor] | None = None
        self.labels = SoftLabels(self.beta, self.scaling, self.seed)
        self._loss = GscLoss(self.gamma, self.temperature)

    def loss(
        self,
        outputs: Mapping[str, torch.Tensor],
        sample_id: torch.Tensor,
        weights: torch.Tensor | None,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """The loss of the pairs `sample_id` `(b,)`, whose labels are multiplied by `weights` `(b,)`."""
        embeds, labels = (outputs["image_embeds"], outputs["text_embeds"]), self.labels.of(ledger, sample_id)
        if weights is not None:  # the evidence must not be masked by them
            self._last_evidence = None
            return self._loss(*embeds, labels.to(weights) * weights)
        loss, self._last_evidence = self._loss.with_evidence(*embeds, labels, masked=self.masked)
        return loss

    def evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Agreement and structure of the own pairs among those of all ranks, float32 `(b,)` each, on the CPU.

        Where the loss of the same pairs was just computed, most of the work is done.
        """
        if self._last_evidence is not None:
            evidence, self._last_evidence = self._last_evidence, None
            return evidence
        labels = self.labels.of(ledger, sample_id) if self.masked else None
        return gsc_evidence(outputs["image_embeds"], outputs["text_embeds"], labels, temperature=self.temperature)


class Objective:
    """The loss of a run over the kept pairs of all ranks.

    Args:
        kind: "softmax" or "sigmoid", the contrastive loss of the model.
        mask_false_negatives: see `ContrastiveLoss`.
        gsc: what takes the place of the contrastive loss once its warm-up is over; None for nothing.

    Attributes:
        columns: ledger columns it keeps.

    Raises:
        ValueError: GSC, with a model of the sigmoid loss.
    """

    def __init__(self, kind: str, mask_false_negatives: bool = False, gsc: GscObjective | None = None):
        if gsc is not None and kind != "softmax":
            raise ValueError(
                f"gsc: its loss is made of softmax probabilities, and the model trains with the {kind} loss; use a "
                "model of the softmax loss, such as CLIP, or leave gsc (objective.gsc in a recipe) out."
            )
        self.contrastive_loss = ContrastiveLoss(kind, mask_false_negatives)
        self.decorrelation = Decorrelation()
        self.gsc = gsc
        self.columns = () if gsc is None else gsc.columns
        self._epoch = 0

    def on_epoch_begin(self, epoch: int) -> None:
        """Told at the start of each epoch (counted from 0), and at a resume in its middle."""
        self._epoch = epoch

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The loss of one batch of `b` pairs, equally many on every rank.

        In training, a MoLA router adds its task-wise decorrelation loss over these pairs, where tasks are known.

        Args:
            model, batch, projections: as of `Decorrelation.added_to`; a `pair_weight` `(b,)` in the batch multiplies
                the losses of the pairs.
            outputs: of the model, as of `ContrastiveLoss`.
            scale, bias: of the model's logits, with gradient.
            ledger: with the soft labels, where there are any.

        Returns:
            A scalar with gradient.
        """
        weights = batch.get("pair_weight")
        if self.gsc is None or self._epoch < self.gsc.warmup_epochs:
            loss = self.contrastive_loss(
                outputs,
                scale=scale,
                bias=bias,
                weights=weights,
                image_key=batch.get("image_key"),
                caption_key=batch.get("caption_key"),
            )
        else:
            # Unless DDP looks for unused parameters, it waits for the gradient of each: these two get a zero.
            loss = self.gsc.loss(outputs, batch["sample_id"], weights, ledger) + 0 * (scale + bias)
        return self.decorrelation.added_to(loss, model, batch, projections) if model.training else loss

    def evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """What is to be recorded of the own `b` pairs of a training step, `(b,)` each; nothing without soft labels."""
        return {} if self.gsc is None else self.gsc.evidence(outputs, sample_id, ledger)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Note the evidence for the pairs of all ranks, `(n,)` each."""
        if self.gsc is not None:
            self.gsc.labels.record(ledger, sample_id, evidence["agreement"], evidence["structure"])

    def update(self, ledger: SampleLedger) -> None:
        """Renew the soft labels; called as `SelectionStrategy.update` is."""
        if self.gsc is not None:
            self.gsc.labels.update(ledger)
