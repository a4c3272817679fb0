"""Online selection by the current correlation alone."""

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest


class ClipScore(SelectionStrategy):
    """Keeps the candidates with the highest correlation under the current weights (CLIPScore, arXiv 2104.08718)."""

    name = "clipscore"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return keep_largest(scores.correlation, k)
