"""Objective of GSC: soft labels that weight the pairs in a loss of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import GscLoss, gsc_evidence
from hf_dissect.models.twin_encoder import split_embeddings
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.recipe.objective_schema import GscSection
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.soft_labels import NETWORK_SUFFIXES, SoftLabels


@dataclass
class GscObjective(RobustObjective):
    """Loss of GSC (CVPR 2024, arXiv 2405.16996), and the soft labels that weight the pairs in it.

    Each training step records the evidence for its pairs, agreement and structure, from the training forward pass.
    Once an epoch, the labels are renewed from the evidence. With `dual` (GSC+), two networks are trained at twice the
    cost, each with the labels that come from the evidence of the other.

    Args:
        gamma: Weight of the loss within the modalities.
        beta: Share of the new evidence in a label, in (0, 1].
        temperature: Temperature of the softmax over the cosines; this loss neither uses nor trains that of the model.
        warmup_epochs: Number of epochs with the contrastive loss, which record evidence as well.
        dual: True for the two networks of a `TwinDualEncoder`, each trained with the labels of the other.
        seed: Seed of the mixture that divides the structures.

    Attributes:
        columns: Ledger columns of evidence and labels.

    Raises:
        ValueError: A value is not allowed.
    """

    gamma: float = GscSection.gamma
    beta: float = GscSection.beta
    temperature: float = GscSection.temperature
    warmup_epochs: int = GscSection.warmup_epochs
    dual: bool = GscSection.dual
    seed: int = 0

    name: ClassVar[str] = "gsc"
    warmup: ClassVar[str] = "train by the contrastive loss, without soft labels"
    after_warmup: ClassVar[str] = "soft labels"

    def __post_init__(self) -> None:
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r}: must be an integer of at least 0.")
        if not isinstance(self.dual, bool):
            raise ValueError(f"dual={self.dual!r}: must be true or false.")
        self._last_evidence: dict[str, torch.Tensor] | None = None
        suffixes = NETWORK_SUFFIXES if self.dual else NETWORK_SUFFIXES[:1]
        self._labels = [SoftLabels(self.beta, self.seed, suffix) for suffix in suffixes]
        self.columns = tuple(column for labels in self._labels for column in labels.columns)
        self.num_networks = 2 if self.dual else 1
        self._loss = GscLoss(self.gamma, self.temperature)

    def compute_loss(
        self,
        contrastive_loss: ContrastiveLoss,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the loss with the soft labels, times the weights of the strategy; see `RobustObjective`.

        For two networks, the result is the sum of their losses.
        """
        sample_id, weights = batch["sample_id"], batch.get("pair_weight")
        losses: list[torch.Tensor] = []
        last_evidence: dict[str, torch.Tensor] = {}
        for own, embeds, labels in self._iterate_networks(outputs, sample_id, ledger):
            if weights is None:
                loss, evidence = self._loss.with_evidence(*embeds, labels)
                last_evidence.update(own.as_columns(evidence))
            else:
                # The evidence is computed apart, because the weights must not mask any of it.
                loss = self._loss(*embeds, labels.to(weights) * weights)
            losses.append(loss)
        self._last_evidence = last_evidence if weights is None else None
        # DDP waits for a gradient of every parameter, so scale and bias get one of zero.
        return sum(losses[1:], losses[0]) + 0 * (scale + bias).sum()

    def compute_evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Compute agreement and structure of the own pairs among those of all ranks.

        Evidence that the loss of the same pairs has just produced is not computed again.

        Args:
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            sample_id: Ids of the pairs, int64 `(b,)`.
            ledger: Ledger with the labels.

        Returns:
            Evidence by ledger column, float32 `(b,)` each, on the CPU.
        """
        if self._last_evidence is not None:
            columns, self._last_evidence = self._last_evidence, None
            return columns
        columns = {}
        for own, embeds, labels in self._iterate_networks(outputs, sample_id, ledger):
            columns.update(own.as_columns(gsc_evidence(*embeds, labels, temperature=self.temperature)))
        return columns

    def _iterate_networks(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> Iterator[tuple[SoftLabels, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yield for each network the labels that its evidence renews, its embeddings, and the labels of its loss."""
        images, texts = (split_embeddings(outputs[f"{side}_embeds"], len(self._labels)) for side in ("image", "text"))
        for own, image, text, other in zip(self._labels, images, texts, reversed(self._labels), strict=True):
            yield own, (image, text), other.of(ledger, sample_id)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write the evidence for the pairs of all ranks to the ledger, `(n,)` each."""
        for labels in self._labels:
            labels.record(ledger, sample_id, *(evidence[column] for column in labels.evidence_columns))

    def update(self, ledger: SampleLedger) -> None:
        """Renew the labels from the evidence, once an epoch."""
        for labels in self._labels:
            labels.update(ledger)
