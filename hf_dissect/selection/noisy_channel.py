"""Online selection by the noisy channel: pairs are drawn in proportion to the weights that the channel gives them."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_dissect.distributed import scale_to_mean_one
from hf_dissect.losses.contrastive import Weigh
from hf_dissect.losses.evidence_temperature import measure_pairs
from hf_dissect.losses.noisy_channel import NoisyChannel, find_evidence
from hf_dissect.selection.inclusion import find_inclusion, sample_systematically
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.opinion import Opinion
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy

SMALLEST_POSTERIOR = 1e-6
"""Posterior of a drawn pair from which the probability that it was drawn with can be recovered."""


class NoisyChannelSampling(SelectionStrategy):
    """A rule that draws candidates with probabilities in proportion to their weights in `NoisyChannel`.

    A candidate of weight `w` is drawn with the probability `a = min(1, c w)`, with `c` so that `k` are drawn, and its
    loss then has the weight `w / a`. The sum of the weighted losses over the drawn pairs is on average the weighted
    sum over all candidates, which the objective of the same name trains on. If fewer than `k` candidates have a
    weight above 0, all of these are drawn, and others at random to fill up; their weight stays 0, so that they are
    negatives of the others only.

    With `repairs`, pairs are drawn for `hf_dissect.objectives.repair.Repair` as well, in proportion to `w + s (1 - P)`
    with the strength `s` of the repair.

    Args:
        repairs: True if pairs that are believed mismatched train by soft targets.

    Attributes:
        channel: `NoisyChannel` with the estimated share of matched pairs.
        repair_strength: Strength of the repair in the current step.
    """

    name = "noisy_channel"
    usage = "draw"
    columns: tuple[str, ...] = ("evidence",)  # type: ignore[misc]  # a class variable of other rules
    samples = True
    records_pairs_alone = True

    def __init__(self, repairs: bool = False) -> None:
        super().__init__()
        self.channel = NoisyChannel()
        self.repairs = repairs
        if repairs:
            self.columns = ("evidence", "posterior")

    def begin_step(self) -> None:
        """Move share and temperature by the candidates of the last step; see `SelectionStrategy.begin_step`."""
        self.channel.begin_step()

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Draw `k` candidates in proportion to their weights; see `SelectionStrategy.select`."""
        posterior = self._find_posterior(scores)
        weights = self.channel.weigh(posterior).double()
        chance = weights + self._find_need_of_repair(posterior.double(), weights)
        chance = chance * (-self.find_handicap(scores.sample_id, ledger)).exp().to(chance)
        inclusion = find_inclusion(chance, k)
        drawn = sample_systematically(inclusion, self.generator)
        return Selection(drawn, (weights[drawn] / inclusion[drawn]).float(), posterior.float())

    def _find_need_of_repair(self, posterior: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        doubt = 1 - posterior
        return self.repair_strength * (weights.sum() / doubt.sum().clamp_min(1e-6)).clamp_max(1) * doubt

    def read_opinion(self, ledger: SampleLedger, batch: Mapping[str, torch.Tensor]) -> Opinion | None:
        """Return the posteriors that the pairs were drawn by; see `SelectionStrategy.read_opinion`."""
        if not self.repairs:
            return None
        posterior = ledger.read("posterior", batch["sample_id"].cpu()).to(batch["pair_weight"])
        weights = self.channel.weigh(posterior)
        return Opinion(posterior, weights, batch["pair_weight"] / weights)

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure evidence and posterior of each candidate, and more of a sample; see `SelectionStrategy.measure`."""
        is_plain = self.channel.temperature.value == 1
        evidence = scores.evidence if is_plain else find_evidence(self._find_losses(scores), scores.num_candidates)
        if scores.is_part:
            return {"evidence": evidence}  # the channel observes whole blocks, see `summarize_block`
        columns = {"evidence": evidence, "posterior": self._find_posterior(scores).float()}
        return columns | measure_pairs(*scores.get_embeds(), scores.logit_scale)

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Record the evidence; see `SelectionStrategy.record`."""
        if measured and "posterior" in measured:
            record_evidence(ledger, sample_id, measured)
            if self.repairs:
                ledger.write("posterior", sample_id, measured["posterior"].clamp_min(SMALLEST_POSTERIOR))

    def summarize(self, measured: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Sum the posteriors, and what was measured of a sample, for the channel; see the base class."""
        return self.channel.summarize(measured["posterior"], measured) if "posterior" in measured else None

    def observe(self, sums: torch.Tensor) -> None:
        """Pass the sums over all ranks on to the channel; see the base class."""
        self.channel.observe_sums(sums)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the weights that follow from the last evidence; see `SelectionStrategy.plan`."""
        return self.channel.weigh(self.channel.posterior_of_evidence(ledger.column("evidence")))

    def reweigh(self, planned: torch.Tensor, inclusion: torch.Tensor) -> Weigh:
        """Return the function to weights that the losses of a step may lower, but not raise; see the base class."""

        def weigh(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            weights = self.channel.weigh(self.channel.posterior(losses, counts))
            return scale_to_mean_one(torch.where(planned < weights, planned, weights) / inclusion)

        return weigh

    def summarize_block(self, sample_id: torch.Tensor, ledger: SampleLedger) -> torch.Tensor:
        """Sum the posteriors of all pairs of a block by their newest evidence; see the base class."""
        evidence = ledger.read("evidence", sample_id)
        return self.channel.summarize(self.channel.posterior_of_evidence(evidence[~evidence.isnan()]))

    def _find_posterior(self, scores: CandidateScores) -> torch.Tensor:
        return self.channel.posterior(self._find_losses(scores), scores.num_candidates)

    def _find_losses(self, scores: CandidateScores) -> torch.Tensor:
        return scores.temper_softmax_loss(self.channel.temperature.value)

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


def record_evidence(ledger: SampleLedger, sample_id: torch.Tensor, measured: Mapping[str, torch.Tensor]) -> None:
    """Write the evidence for pairs to a ledger.

    Args:
        ledger: Ledger with the column `evidence`.
        sample_id: Ids of the pairs, int64 `(n,)`.
        measured: `evidence` of these pairs, float32 `(n,)`, NaN where there is none.
    """
    known = ~measured["evidence"].isnan()
    ledger.write("evidence", sample_id[known], measured["evidence"][known])
