"""The two rules that ignore scores: a random subset, and everything."""

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_random


class Random(SelectionStrategy):
    """A rule that keeps a uniformly random subset of each batch: the baseline for every other rule."""

    name = "random"
    usage = "choice"

    @property
    def first_planned_epoch(self) -> int:
        """First epoch, from 0, that is planned: there is nothing to wait for."""
        return 0

    def needs_scores(self, epoch: int) -> bool:
        """Return False."""
        return False

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan nothing in particular, so that the pairs of a block are chosen at random."""
        return torch.zeros(len(ledger))

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep `k` random candidates; see `SelectionStrategy.select`."""
        return keep_random(scores.num_candidates, k, self.generator)


class KeepAll(SelectionStrategy):
    """A rule that keeps every candidate, whatever the ratio: plain training through the same code."""

    name = "none"
    keeps_all = True

    def needs_scores(self, epoch: int) -> bool:
        """Return False."""
        return False

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep all candidates; see `SelectionStrategy.select`."""
        return Selection(indices=torch.arange(scores.num_candidates))
