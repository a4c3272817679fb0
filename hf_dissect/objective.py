"""What a run minimises: the contrastive loss or, with soft labels, GSC's; and the decorrelation of a MoLA router."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import GscLoss, gsc_evidence
from hf_dissect.models.tasks import Decorrelation
from hf_dissect.models.twin_encoder import embeddings_of_networks
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.soft_labels import SoftLabels

SUFFIXES = ("", "_2")
"""Of the ledger columns of each network."""


def label_columns(ledger: SampleLedger) -> list[tuple[str, ...]]:
    """The ledger columns that hold soft labels, of which the minimum counts; one entry for each network."""
    columns = [SoftLabels(suffix=suffix).label_columns for suffix in SUFFIXES]
    return [names for names in columns if set(names) <= set(ledger.columns)]


@dataclass
class GscObjective:
    """The loss of GSC (CVPR 2024, arXiv 2405.16996), and the soft labels that it weights the pairs with.

    In each training step the evidence for a pair, its agreement and its structure, is recorded from the training
    forward; from it the labels are renewed once an epoch. With `dual` (GSC+), two networks are trained, each with the
    labels that the other's evidence gave, at twice the cost.

    Args:
        gamma: weight of the loss within the modalities.
        beta: share of the new evidence in a label, in (0, 1].
        temperature: of the softmax over the cosines; the model's own is neither used nor trained by this loss.
        warmup_epochs: epochs that train by the contrastive loss while evidence is recorded.
        dual: whether two networks take each other's labels; the model is then a `TwinDualEncoder`.
        seed: of the mixture.

    Attributes:
        columns: ledger columns it keeps.

    Raises:
        ValueError: a value is impossible.
    """

    gamma: float = 0.01
    beta: float = 0.7
    temperature: float = 0.07
    warmup_epochs: int = 1
    dual: bool = False
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r}: must be an integer of at least 0.")
        if not isinstance(self.dual, bool):
            raise ValueError(f"dual={self.dual!r}: must be true or false.")
        self._last_evidence: dict[str, torch.Tensor] | None = None
        suffixes = SUFFIXES if self.dual else SUFFIXES[:1]
        self._labels = [SoftLabels(self.beta, self.seed, suffix) for suffix in suffixes]
        self.columns = tuple(column for labels in self._labels for column in labels.columns)
        self._loss = GscLoss(self.gamma, self.temperature)

    def loss(
        self,
        outputs: Mapping[str, torch.Tensor],
        sample_id: torch.Tensor,
        weights: torch.Tensor | None,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """The loss of the pairs `sample_id` `(b,)`, whose labels are multiplied by `weights` `(b,)`.

        Of two networks it is the sum.
        """
        losses, self._last_evidence = [], {} if weights is None else None  # the evidence must not be masked by them
        for own, embeds, labels in self._networks(outputs, sample_id, ledger):
            if weights is not None:
                losses.append(self._loss(*embeds, labels.to(weights) * weights))
                continue
            loss, evidence = self._loss.with_evidence(*embeds, labels)
            losses.append(loss)
            self._last_evidence.update(own.as_columns(evidence))
        return sum(losses)

    def evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Agreement and structure of the own pairs among those of all ranks, float32 `(b,)` each, on the CPU.

        Where the loss of the same pairs was just computed, most of the work is done.
        """
        if self._last_evidence is not None:
            columns, self._last_evidence = self._last_evidence, None
            return columns
        columns = {}
        for own, embeds, labels in self._networks(outputs, sample_id, ledger):
            columns.update(own.as_columns(gsc_evidence(*embeds, labels, temperature=self.temperature)))
        return columns

    def _networks(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> Iterator[tuple[SoftLabels, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Of each network: the labels that its evidence is for, its embeddings, and the labels that it trains with."""
        count = len(self._labels)
        embeds = zip(
            *(embeddings_of_networks(outputs[f"{side}_embeds"], count) for side in ("image", "text")), strict=True
        )
        for own, own_embeds, other in zip(self._labels, embeds, reversed(self._labels), strict=True):
            yield own, own_embeds, other.of(ledger, sample_id)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Note the evidence for the pairs of all ranks, `(n,)` each."""
        for labels in self._labels:
            labels.record(ledger, sample_id, *(evidence[column] for column in labels.evidence_columns))

    def update(self, ledger: SampleLedger) -> None:
        """Renew the labels, once an epoch."""
        for labels in self._labels:
            labels.update(ledger)


class Objective:
    """The loss of a run over the kept pairs of all ranks.

    Args:
        kind: "softmax" or "sigmoid", the contrastive loss of the model.
        mask_false_negatives: see `ContrastiveLoss`.
        gsc: what takes the place of the contrastive loss once its warm-up is over; None for nothing.
        num_networks: of the model, 2 for a `TwinDualEncoder`; its losses are the sums of those of the networks.

    Attributes:
        columns: ledger columns it keeps.

    Raises:
        ValueError: GSC, with a model of the sigmoid loss, or with one network where two are meant or the reverse.
    """

    def __init__(
        self, kind: str, mask_false_negatives: bool = False, gsc: GscObjective | None = None, num_networks: int = 1
    ):
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
            model, batch, projections: as of `Decorrelation.add_to`; a `pair_weight` `(b,)` in the batch multiplies
                the losses of the pairs.
            outputs: of the model, as of `ContrastiveLoss`.
            scale, bias: of the model's logits, with gradient; of two networks `(2,)`.
            ledger: with the soft labels, where there are any.

        Returns:
            A scalar with gradient.
        """
        weights = batch.get("pair_weight")
        if self.gsc is None or self._epoch < self.gsc.warmup_epochs:
            loss = self._contrastive_loss(batch, outputs, scale, bias, weights)
        else:
            # Unless DDP looks for unused parameters, it waits for the gradient of each: these two get a zero.
            loss = self.gsc.loss(outputs, batch["sample_id"], weights, ledger) + 0 * (scale + bias).sum()
        return self.decorrelation.add_to(loss, model, batch, projections) if model.training else loss

    def _contrastive_loss(
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
            embeddings_of_networks(outputs[name], self.num_networks) for name in ("image_embeds", "text_embeds")
        )
        return sum(
            self.contrastive_loss(
                {"image_embeds": own_images, "text_embeds": own_texts},
                scale=own_scale,
                bias=own_bias,
                weights=weights,
                **keys,
            )
            for own_images, own_texts, own_scale, own_bias in zip(images, texts, scale, bias, strict=True)
        )

    def evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """What is to be recorded of the own `b` pairs of a training step, `(b,)` each; nothing without soft labels."""
        return {} if self.gsc is None else self.gsc.evidence(outputs, sample_id, ledger)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Note the evidence for the pairs of all ranks, `(n,)` each."""
        if self.gsc is not None:
            self.gsc.record(sample_id, evidence, ledger)

    def update(self, ledger: SampleLedger) -> None:
        """Renew the soft labels; called as `SelectionStrategy.update` is."""
        if self.gsc is not None:
            self.gsc.update(ledger)
