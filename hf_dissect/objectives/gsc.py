"""Objective of GSC: soft labels that weight the pairs in a loss of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import Agreement, GscLoss, average_probabilities, gsc_evidence
from hf_dissect.losses.noisy_channel import NoisyChannel
from hf_dissect.models.twin_encoder import split_embeddings
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.recipe.objective_schema import GscSection
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.opinion import Opinion
from hf_dissect.selection.soft_labels import NETWORK_SUFFIXES, SoftLabels
from hf_dissect.settings import check_values


@dataclass
class GscObjective(RobustObjective):
    """Loss of GSC (CVPR 2024, arXiv 2405.16996), and the soft labels that weight the pairs in it.

    Each training step records the evidence for its pairs, agreement and structure, from the training forward pass.
    Once an epoch, the labels are renewed from the evidence. With `dual` (GSC+), two networks are trained at twice the
    cost, each with the labels that come from the evidence of the other.

    The agreement of a pair is the softmax probability `q` of its true partner among the `n` pairs of all ranks. It is
    small among many pairs, even of a matched pair. With the evidence "posterior", which is not of the paper, the
    agreement is the probability that the pair is matched, `P = pi n q / (pi n q + 1 - pi)` (`NoisyChannel`), with the
    share `pi` estimated as the run goes, one share for each network. Its `-log q` is the mean of the cross-entropies
    of both directions at `temperature`, as `NoisyChannel` takes them, while the agreement of the paper is the mean of
    both probabilities. A label is then a probability that comes close to 1 for pairs learnt by heart, too; so the
    weight of a pair, and its mask in the structures, is the square of its label, as `NoisyChannel` weighs.

    Args:
        gamma: Weight of the loss within the modalities.
        beta: Share of the new evidence in a label, in (0, 1].
        temperature: Temperature of the softmax over the cosines; this loss neither uses nor trains that of the model.
        warmup_epochs: Number of epochs with the contrastive loss, which record evidence as well.
        dual: True for the two networks of a `TwinDualEncoder`, each trained with the labels of the other.
        seed: Seed of the mixture that divides the structures.
        evidence: Agreement that the labels follow, "probability" (that of the paper) or "posterior".

    Attributes:
        columns: Ledger columns of evidence and labels.
        channels: `NoisyChannel` of each network; empty without posteriors.
        opinion: Labels as probabilities, and the weights that follow from them, which are the labels themselves
            without posteriors. None for two networks, each of which has labels of its own.

    Raises:
        ValueError: A value is not allowed.
    """

    gamma: float = GscSection.gamma
    beta: float = GscSection.beta
    temperature: float = GscSection.temperature
    warmup_epochs: int = GscSection.warmup_epochs
    dual: bool = GscSection.dual
    seed: int = 0
    evidence: str = GscSection.evidence

    name: ClassVar[str] = "gsc"
    reads_ledger: ClassVar[bool] = True
    warmup: ClassVar[str] = "train by the contrastive loss, without soft labels"
    after_warmup: ClassVar[str] = "soft labels"

    def __post_init__(self) -> None:
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r}: must be an integer of at least 0.")
        if not isinstance(self.dual, bool):
            raise ValueError(f"dual={self.dual!r}: must be true or false.")
        check_values(GscSection, {"evidence": self.evidence})
        self._last_evidence: dict[str, torch.Tensor] | None = None
        suffixes = NETWORK_SUFFIXES if self.dual else NETWORK_SUFFIXES[:1]
        self._labels = [SoftLabels(self.beta, self.seed, suffix) for suffix in suffixes]
        self.columns = tuple(column for labels in self._labels for column in labels.columns)
        self.num_networks = 2 if self.dual else 1
        self.channels = [NoisyChannel() for _ in self._labels] if self.evidence == "posterior" else []
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
        for network in self._list_networks(outputs, sample_id, ledger):
            if weights is None:
                loss, evidence = self._loss.with_evidence(*network.embeds, network.weights, network.agreement)
                last_evidence.update(network.own.as_columns(evidence))
            else:
                # The evidence is computed apart, because the weights must not mask any of it.
                loss = self._loss(*network.embeds, network.weights.to(weights) * weights)
            losses.append(loss)
            if not self.dual:
                device = network.embeds[0].device
                self.opinion = Opinion(network.labels.to(device), network.weights.to(device))
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
        for network in self._list_networks(outputs, sample_id, ledger):
            evidence = gsc_evidence(
                *network.embeds, network.weights, temperature=self.temperature, agreement=network.agreement
            )
            columns.update(network.own.as_columns(evidence))
        return columns

    def _list_networks(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> Iterator["_Network"]:
        images, texts = (split_embeddings(outputs[f"{side}_embeds"], len(self._labels)) for side in ("image", "text"))
        places = enumerate(zip(self._labels, images, texts, reversed(self._labels), strict=True))
        for place, (own, image, text, other) in places:
            labels = other.of(ledger, sample_id)
            if not self.channels:
                yield _Network(own, average_probabilities, (image, text), labels, labels)
                continue
            channel = self.channels[place]
            weights = channel.weigh(labels)
            yield _Network(own, partial(_find_posteriors, channel), (image, text), labels, weights)

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write the evidence for pairs to the ledger, `(n,)` each."""
        for labels in self._labels:
            labels.record(ledger, sample_id, *(evidence[column] for column in labels.evidence_columns))

    def summarize(self, evidence: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Sum the posteriors for the channel of each network; None without posteriors."""
        both = zip(self.channels, self._labels, strict=False)
        sums = [channel.summarize(evidence[labels.evidence_columns[0]]) for channel, labels in both]
        return torch.cat(sums) if sums else None

    def observe(self, sums: torch.Tensor) -> None:
        """Pass the sums over all ranks on to the channels."""
        for channel, own in zip(self.channels, sums.chunk(len(self.channels)), strict=True):
            channel.observe_sums(own)

    def update(self, ledger: SampleLedger) -> None:
        """Renew the labels from the evidence, once an epoch."""
        for labels in self._labels:
            labels.update(ledger)

    def begin_step(self) -> None:
        """Move the shares of matched pairs by the pairs of the last step, and forget the opinion about them."""
        self.opinion = None  # a second training begins with a warm-up, too
        for channel in self.channels:
            channel.begin_step()

    def pop_logs(self) -> dict[str, float]:
        """Return the estimated share of mismatched pairs for the logs; empty without posteriors."""
        return {f"selection_{name}": value for name, value in self.compute_figures().items()}

    def compute_figures(self) -> dict[str, float]:
        """Return the estimated share of mismatched pairs, the mean of the networks; empty without posteriors."""
        figures = [channel.compute_figures() for channel in self.channels]
        return {name: fmean(own[name] for own in figures) for name in (figures[0] if figures else ())}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the channels; empty without posteriors, since all else is in the ledger."""
        return {"channels": [channel.state_dict() for channel in self.channels]} if self.channels else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; without one, as of an earlier version, the shares begin at 1/2."""
        for channel, own in zip(self.channels, state.get("channels", ()), strict=False):
            channel.load_state_dict(own)


@dataclass(frozen=True)
class _Network:
    """One of the networks in a step.

    Attributes:
        own: Labels that its evidence renews.
        agreement: Function that computes its agreement.
        embeds: Embeddings of images and texts, `(b, D)` each.
        labels: Labels of the pairs in its loss, `(b,)`.
        weights: Weights that follow from the labels, `(b,)`.
    """

    own: SoftLabels
    agreement: Agreement
    embeds: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor


def _find_posteriors(
    channel: NoisyChannel, of_texts: torch.Tensor, of_images: torch.Tensor, count: int
) -> torch.Tensor:
    return channel.posterior((of_texts + of_images) / 2, count)
