"""Online selection by the reducible loss: what remains of a pair's loss beyond its irreducible loss."""

from collections.abc import Mapping

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest_known


class Rho(SelectionStrategy):
    """A rule that keeps the candidates with the largest reducible holdout loss (RHO-LOSS, arXiv 2206.07137).

    It is equation 3 of the paper, `L[y | x; D_t] - L[y | x; D_ho]`: the current loss minus the irreducible loss, which
    the pair has under a model that was trained on held-out data. Here both are the contrastive loss of the pair in a
    batch of candidates.

    The irreducible loss is taken *once* and stays fixed, as in algorithm 1 of the paper: the loss in the shuffled
    batch in which the reference met the pair. `Learnability` and `Jest` instead compare both models on the batch of
    the moment. For a stream, the batch of the first visit decides.

    A pair that the reference could not score takes the median of its batch.
    """

    name = "rho"
    usage = "choice"
    columns = ("reference_loss",)
    records_pairs_alone = True
    reference = "stored"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest reducible losses; see `SelectionStrategy.select`."""
        return keep_largest_known(scores.loss - self._find_irreducible(scores, ledger), k, self.generator)

    def measure_reference(self, scores: CandidateScores) -> Mapping[str, torch.Tensor]:
        """Measure the irreducible losses; see `SelectionStrategy.measure_reference`."""
        return {"reference_loss": scores.loss}

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure the irreducible losses, if they are not in the ledger; see `SelectionStrategy.measure`."""
        return {} if scores.reference is None else {"reference_loss": self._find_irreducible(scores, ledger)}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Record the irreducible losses; see `SelectionStrategy.record`."""
        if measured and "reference_loss" in measured:
            ledger.write("reference_loss", sample_id, measured["reference_loss"])

    def _find_irreducible(self, scores: CandidateScores, ledger: SampleLedger) -> torch.Tensor:
        known = ledger.read("reference_loss", scores.sample_id)
        return known if scores.reference is None else torch.where(known.isnan(), scores.reference.loss, known)
