"""Objective of the noisy channel: pairs are weighted by the probability that their caption is not a stranger's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.evidence_temperature import TemperedLosses
from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.losses.noisy_channel import NoisyChannel, find_evidence
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.recipe.objective_schema import NoisyChannelSection
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.noisy_channel import record_evidence
from hf_dissect.selection.opinion import Opinion
from hf_dissect.settings import check_values


class NoisyChannelObjective(RobustObjective):
    """Contrastive loss whose pairs have the weights of `NoisyChannel`, from the losses of the same forward pass.

    It needs no scores and no history, so it works for pairs that are seen once. Weights of a strategy multiply with
    its own. The evidence for each pair is in the ledger column `evidence`, see `compute_pair_evidence`.

    The sigmoid loss decides for each image and caption whether they are a pair. The odds that the model gives a pair
    are its density ratio up to a factor, which depends on the bias and on the batches that the bias was trained on.
    Over strangers, the mean of the ratio is 1 by definition. With the mean over the batch in place of the factor, the
    posterior is that of a softmax over the same logits. The weight multiplies the term of the pair itself: those of
    the strangers in its row are right, also if the pair is not.

    The targets of the softmax loss can be smoothed, so that near-duplicates and captions that nearly fit are no errors
    to be learnt by heart. The sigmoid loss has no smoothing.

    Args:
        smoothing: Share of the targets that is uniform over the pairs, in [0, 1).

    Attributes:
        channel: `NoisyChannel` with the estimated share of matched pairs.
    """

    name: ClassVar[str] = "noisy_channel"
    kinds: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")
    columns = ("evidence",)
    takes_mask: ClassVar[bool] = True

    def __init__(self, smoothing: float = NoisyChannelSection.smoothing) -> None:
        check_values(NoisyChannelSection, {"smoothing": smoothing})
        self.smoothing = smoothing
        self.channel = NoisyChannel()
        self._last_evidence: dict[str, torch.Tensor] = {}

    def begin_step(self) -> None:
        """Move the share of matched pairs and the temperature by the pairs of the last step."""
        self.channel.begin_step()

    def compute_loss(
        self,
        contrastive_loss: ContrastiveLoss,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the weighted contrastive loss, times the weights of the strategy; see `RobustObjective`."""
        given = batch.get("pair_weight")
        own_weights: list[torch.Tensor] = []
        is_softmax = contrastive_loss.kind == "softmax"
        row_losses = TemperedLosses(self.channel.temperature.value, self.smoothing if is_softmax else 0.0)
        softmax = ContrastiveLoss(
            "softmax", contrastive_loss.mask_false_negatives, contrastive_loss.max_logits, row_losses
        )

        self.channel.smoothing = row_losses.smoothing

        def weigh(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            losses = self.channel.correct(losses, counts)
            posterior = self.channel.posterior(losses, counts)
            evidence = find_evidence(losses, counts)
            self._last_evidence = {"evidence": evidence, "posterior": posterior.float()}
            self._last_evidence |= row_losses.pop_columns(counts)
            own_weights.append(self.channel.weigh(posterior))
            self.opinion = Opinion(posterior, own_weights[0])
            return own_weights[0] if given is None else own_weights[0] * given.to(losses)

        keys = {name: batch.get(name) for name in ("image_key", "caption_key")}
        if is_softmax:
            return softmax(outputs, scale=scale, bias=bias, weights=weigh, **keys)
        with torch.no_grad():
            softmax(outputs, scale=scale, weights=weigh, **keys)
        loss = contrastive_loss(outputs, scale=scale, bias=bias, weights=given, **keys)
        lacking = 1 - own_weights[0] if given is None else (1 - own_weights[0]) * given.to(own_weights[0])
        images, texts = (promote_to_float32(outputs[name]) for name in ("image_embeds", "text_embeds"))
        logits = (texts * images).sum(-1) * scale + bias
        return loss - (lacking * F.softplus(-logits)).mean()

    def compute_evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Return evidence and posterior of the pairs whose loss was computed last, and measurements of a sample."""
        evidence, self._last_evidence = self._last_evidence, {}
        return evidence

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write the evidence to the ledger."""
        if "posterior" in evidence:
            record_evidence(ledger, sample_id, evidence)

    def summarize(self, evidence: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Sum the posteriors, and what was measured of a sample, for the channel."""
        return self.channel.summarize(evidence["posterior"], evidence) if "posterior" in evidence else None

    def observe(self, sums: torch.Tensor) -> None:
        """Pass the sums over all ranks on to the channel."""
        self.channel.observe_sums(sums)

    def pop_logs(self) -> dict[str, float]:
        """Return the estimated share of mismatched pairs, and a temperature below 1, for the logs."""
        return self.channel.pop_logs()

    def compute_figures(self) -> dict[str, float]:
        """Return the estimated share of mismatched pairs, for `metrics.json`."""
        return self.channel.compute_figures()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the channel."""
        return self.channel.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.channel.load_state_dict(state)
