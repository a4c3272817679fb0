"""Objective of a run: the contrastive loss or, with soft labels, that of GSC, plus the decorrelation of a router."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import GscLoss, gsc_evidence
from hf_dissect.models.families import check_outputs
from hf_dissect.models.tasks import Decorrelation
from hf_dissect.models.twin_encoder import split_embeddings
from hf_dissect.recipe.schema import GscSection
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.soft_labels import NETWORK_SUFFIXES, SoftLabels


@dataclass
class GscObjective:
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

    def __post_init__(self) -> None:
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r}: must be an integer of at least 0.")
        if not isinstance(self.dual, bool):
            raise ValueError(f"dual={self.dual!r}: must be true or false.")
        self._last_evidence: dict[str, torch.Tensor] | None = None
        suffixes = NETWORK_SUFFIXES if self.dual else NETWORK_SUFFIXES[:1]
        self._labels = [SoftLabels(self.beta, self.seed, suffix) for suffix in suffixes]
        self.columns = tuple(column for labels in self._labels for column in labels.columns)
        self._loss = GscLoss(self.gamma, self.temperature)

    def compute_loss(
        self,
        outputs: Mapping[str, torch.Tensor],
        sample_id: torch.Tensor,
        weights: torch.Tensor | None,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the loss of the own pairs among those of all ranks.

        Args:
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            sample_id: Ids of the pairs, int64 `(b,)`.
            weights: Weights that multiply the labels, float32 `(b,)`; None for equal weights.
            ledger: Ledger with the labels.

        Returns:
            Loss `()` with gradient; for two networks, the sum of their losses.
        """
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
        return sum(losses[1:], losses[0])

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


class Objective:
    """Loss of a run over the kept pairs of all ranks.

    Args:
        kind: Contrastive loss of the model, "softmax" or "sigmoid".
        mask_false_negatives: True to leave pairs that share an image or a caption out of each other's negatives.
        gsc: Objective that replaces the contrastive loss after its warm-up; None for the contrastive loss throughout.
        num_networks: Number of networks of the model, 2 for a `TwinDualEncoder`, whose losses are added.

    Attributes:
        columns: Ledger columns of the objective.

    Raises:
        ValueError: GSC does not fit the loss of the model or its number of networks.
    """

    def __init__(
        self, kind: str, mask_false_negatives: bool = False, gsc: GscObjective | None = None, num_networks: int = 1
    ) -> None:
        if gsc is not None and kind != "softmax":
            raise ValueError(
                f"gsc: its loss is made of softmax probabilities, and the model trains with the {kind} loss; use a "
                "model of the softmax loss, such as CLIP, or leave gsc (objective.gsc in a recipe) out."
            )
        if gsc is not None and gsc.dual != (num_networks == 2):
            raise ValueError(
                "gsc: dual=true trains two networks, and the model is one; join two by "
                "hf_dissect.TwinDualEncoder.of(first, second)."
                if gsc.dual
                else "gsc: the model consists of two networks, which dual=true trains; set it, or give one of them."
            )
        self.contrastive_loss = ContrastiveLoss(kind, mask_false_negatives)
        self.num_networks = num_networks
        self.decorrelation = Decorrelation()
        self.gsc = gsc
        self.columns: tuple[str, ...] = () if gsc is None else gsc.columns
        self._epoch = 0

    def on_epoch_begin(self, epoch: int) -> None:
        """Set the epoch, counted from 0, when it begins or is resumed."""
        self._epoch = epoch

    def compute_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the loss of a batch of `b` pairs, the same number on every rank.

        In training, the task-wise decorrelation loss of a MoLA router is added if the pairs have tasks.

        Args:
            model: Model that computed the outputs.
            batch: Batch, with the weights of the pairs as `pair_weight` float32 `(b,)` if the strategy weights them.
            outputs: Outputs of the model, see `ContrastiveLoss`.
            scale: Factor of the similarities in the logits, with gradient, `()`; for two networks `(2,)`.
            bias: Summand of the logits, with gradient, `()`; for two networks `(2,)`.
            ledger: Ledger with the soft labels, if there are any.
            projections: Projections that a router is decorrelated by; None for those of the last forward pass.

        Returns:
            Loss `()` with gradient.
        """
        check_outputs(outputs)
        weights = batch.get("pair_weight")
        if self.gsc is None or self._epoch < self.gsc.warmup_epochs:
            loss = self._compute_contrastive_loss(batch, outputs, scale, bias, weights)
        else:
            # DDP waits for a gradient of every parameter, so scale and bias get one of zero.
            loss = self.gsc.compute_loss(outputs, batch["sample_id"], weights, ledger) + 0 * (scale + bias).sum()
        return self.decorrelation.add_to(loss, model, batch, projections) if model.training else loss

    def _compute_contrastive_loss(
        self,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        keys = {name: batch.get(name) for name in ("image_key", "caption_key")}
        if self.num_networks == 1:
            return self.contrastive_loss(outputs, scale=scale, bias=bias, weights=weights, **keys)
        images, texts = (
            split_embeddings(outputs[name], self.num_networks) for name in ("image_embeds", "text_embeds")
        )
        losses = [
            self.contrastive_loss(
                {"image_embeds": own_images, "text_embeds": own_texts},
                scale=own_scale,
                bias=own_bias,
                weights=weights,
                **keys,
            )
            for own_images, own_texts, own_scale, own_bias in zip(images, texts, scale, bias, strict=True)
        ]
        return sum(losses[1:], losses[0])

    def compute_evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Return the evidence for the own `b` pairs of a training step, `(b,)` each; empty without soft labels."""
        return {} if self.gsc is None else self.gsc.compute_evidence(outputs, sample_id, ledger)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write the evidence for the pairs of all ranks to the ledger, `(n,)` each."""
        if self.gsc is not None:
            self.gsc.record(sample_id, evidence, ledger)

    def update(self, ledger: SampleLedger) -> None:
        """Renew the soft labels, once an epoch, as `SelectionStrategy.update` does for a strategy."""
        if self.gsc is not None:
            self.gsc.update(ledger)
