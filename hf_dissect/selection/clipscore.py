"""Online selection by the current correlation alone."""

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest


class ClipScore(SelectionStrategy):
    """A rule that keeps the candidates with the highest current correlation (CLIPScore, arXiv 2104.08718)."""

    name = "clipscore"
    usage = "choice"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest correlations; see `SelectionStrategy.select`."""
        return keep_largest(scores.correlation, k)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the last correlation; see `SelectionStrategy.plan`."""
        return ledger.column("correlation")
