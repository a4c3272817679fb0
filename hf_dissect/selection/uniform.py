"""The two rules that look at nothing: a random subset, and everything."""

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_random


class Random(SelectionStrategy):
    """Keeps a uniformly random subset of each batch: the yardstick that any rule has to beat."""

    name = "random"

    def needs_scores(self, epoch: int) -> bool:
        return False

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return keep_random(scores.num_candidates, k, self.generator)


class KeepAll(SelectionStrategy):
    """Keeps every candidate, whatever the ratio: plain training through the same path."""

    name = "none"
    keeps_all = True

    def needs_scores(self, epoch: int) -> bool:
        return False

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return Selection(indices=torch.arange(scores.num_candidates))
