"""Online selection by the rank of a pair's current loss in its batch, from either end."""

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest


class SmallLoss(SelectionStrategy):
    """Keeps the candidates with the smallest contrastive loss, which are the likeliest to be matched.

    The small-loss criterion of Co-teaching (NeurIPS 2018, arXiv 1804.06872), on the loss within the candidate batch.
    """

    name = "small_loss"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return keep_largest(-scores.loss, k)


class BigLoss(SelectionStrategy):
    """Keeps the candidates with the largest contrastive loss, the hardest ones (arXiv 1910.00762 and others)."""

    name = "big_loss"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return keep_largest(scores.loss, k)
