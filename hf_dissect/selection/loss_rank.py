"""Online selection by the rank of a pair's current loss in its batch, from either end."""

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest


class SmallLoss(SelectionStrategy):
    """A rule that keeps the candidates with the smallest contrastive loss, which are most likely matched.

    It is the small-loss criterion of Co-teaching (NeurIPS 2018, arXiv 1804.06872), on the loss within the candidate
    batch.
    """

    name = "small_loss"
    usage = "choice"
    plan_columns = ("evidence",)

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` smallest losses; see `SelectionStrategy.select`."""
        return keep_largest(-scores.loss, k)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the evidence for each pair, which falls as its loss grows; see `SelectionStrategy.plan`."""
        return ledger.column("evidence")


class BigLoss(SelectionStrategy):
    """A rule that keeps the candidates with the largest contrastive loss, the hardest ones (arXiv 1910.00762)."""

    name = "big_loss"
    usage = "choice"
    plan_columns = ("evidence",)

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest losses; see `SelectionStrategy.select`."""
        return keep_largest(scores.loss, k)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the evidence against each pair; see `SelectionStrategy.plan`."""
        return -ledger.column("evidence")
