"""Online selection by GSC's soft labels: the pairs whose geometry agrees best with that of the others."""

from collections.abc import Mapping

import torch

from hf_dissect.losses.gsc import gsc_evidence
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import GscOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.soft_labels import SoftLabels
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest, keep_random
from hf_dissect.settings import check_values


class Gsc(SelectionStrategy):
    """A rule that keeps the candidates with the largest soft labels (CVPR 2024, arXiv 2405.16996).

    The paper weights the loss by the labels (`hf_dissect.losses.GscLoss`); keeping the largest of them turns that into
    a selection rule. Evidence is the geometry of each candidate batch. If all labels of a batch are the same, as
    before the first update, the candidates are selected at random.

    Args:
        beta, temperature, seed: See `GscOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "gsc"
    usage = "choice"
    columns = SoftLabels.columns
    records_pairs_alone = True

    def __init__(
        self,
        beta: float = GscOptions.beta,
        temperature: float = GscOptions.temperature,
        seed: int = GscOptions.seed,
    ) -> None:
        super().__init__()
        check_values(GscOptions, {"beta": beta, "temperature": temperature, "seed": seed})
        self.soft_labels = SoftLabels(beta, seed)
        self.temperature = temperature

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest labels; see `SelectionStrategy.select`."""
        labels = self.soft_labels.of(ledger, scores.sample_id)
        if labels.min() == labels.max():
            return keep_random(len(labels), k, self.generator)
        return keep_largest(labels, k)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the labels; see `SelectionStrategy.plan`."""
        return torch.where(ledger.column("correlation").isnan(), torch.nan, self.soft_labels.of_all(ledger))

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure the evidence of each candidate; see `SelectionStrategy.measure`."""
        labels = self.soft_labels.of(ledger, scores.sample_id)
        return gsc_evidence(*scores.get_embeds(), labels, temperature=self.temperature, across_ranks=False)

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Record the evidence; see `SelectionStrategy.record`."""
        if measured:
            self.soft_labels.record(ledger, sample_id, measured["agreement"], measured["structure"])

    def update(self, ledger: SampleLedger) -> None:
        """Update the labels; see `SelectionStrategy.update`."""
        self.soft_labels.update(ledger)
