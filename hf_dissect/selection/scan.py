"""Online selection by SCAN: the pairs at both ends of the loss are pruned, more of them from epoch to epoch."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import ScanOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest
from hf_dissect.settings import check_values

ILL_MATCHED, REDUNDANT = 1.0, -1.0
"""Values of the ledger column for the two kinds of pairs that may be pruned; 0 for the others."""


class Scan(SelectionStrategy):
    """Dynamic bootstrapping of the training set (SCAN, arXiv 2411.09126).

    After a warm-up on all candidates, the run goes in cycles. In the first epoch of a cycle all candidates train, and
    those at both ends of the loss within each batch are marked: the largest losses as ill-matched, the smallest as
    redundant. In each of the following `cycle` epochs a random part of the marked pairs is pruned, which grows as
    `(1 + cos(pi (cycle - e) / cycle)) / 2` in the e-th of them, to all of them in the last.

    The share of pairs to mark is 1 minus the selection ratio, so the ratio is the smallest one of a cycle, and the
    ratio of an epoch, the same in each of its steps and on every rank, follows from the part to prune. A batch with
    more marked pairs than there are to prune keeps a random part of them; one with fewer also drops random others. A
    pair that was never seen, or came after the marking, is not marked. The loss is the mean of both directions, where
    the paper intersects their ends; the paper ends the warm-up when the loss falls by less than 30 % in an epoch.

    Args:
        warmup_epochs: Number of epochs before the first cycle.
        cycle, ill_matched: See `ScanOptions`.

    Attributes:
        warmup_epochs: Number of epochs before the first one that prunes, one more than the argument.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "scan"
    usage = "choice"
    columns = ("prunable",)
    records_pairs_alone = True
    warmup: ClassVar[str] = "train on all candidates"

    def __init__(
        self, warmup_epochs: int = 1, cycle: int = ScanOptions.cycle, ill_matched: float = ScanOptions.ill_matched
    ) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={warmup_epochs}: must be at least 0.")
        check_values(ScanOptions, {"cycle": cycle, "ill_matched": ill_matched})
        self.warmup_epochs = warmup_epochs + 1
        self.cycle = cycle
        self.ill_matched = ill_matched
        self._epoch = 0
        self._ratio = 0.5

    def find_place(self, epoch: int) -> int | None:
        """Return the place of an epoch in its cycle, 0 for the one that marks pairs; None during the warm-up."""
        since = epoch - (self.warmup_epochs - 1)
        return since % (self.cycle + 1) if since >= 0 else None

    def needs_scores(self, epoch: int) -> bool:
        """Return True for the epochs that mark pairs."""
        return self.find_place(epoch) == 0

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Remember the epoch; see `SelectionStrategy.on_epoch_begin`."""
        self._epoch = epoch

    def choose_ratio(self, ratio: float) -> float:
        """Return the ratio of the epoch; see `SelectionStrategy.choose_ratio`."""
        self._ratio = ratio
        place = self.find_place(self._epoch)
        part = (1 + math.cos(math.pi * (self.cycle - place) / self.cycle)) / 2 if place else 0.0
        return 1 - part * (1 - ratio)

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep `k` random candidates, the marked ones last; see `SelectionStrategy.select`."""
        is_marked = ledger.read("prunable", scores.sample_id).nan_to_num().abs()
        return keep_largest(torch.rand(len(is_marked), generator=self.generator) - is_marked, k)

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Mark the ends of the loss in the first epoch of a cycle; see `SelectionStrategy.measure`."""
        if self.find_place(self._epoch) != 0:
            return {}
        order = scores.loss.argsort(descending=True, stable=True)
        num_marked = round((1 - self._ratio) * len(order))
        num_ill_matched = round(self.ill_matched * num_marked)
        marks = torch.zeros(len(order))
        marks[order[:num_ill_matched]] = ILL_MATCHED
        marks[order[len(order) - (num_marked - num_ill_matched) :]] = REDUNDANT
        return {"prunable": marks}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Record the marks; see `SelectionStrategy.record`."""
        if measured:
            ledger.write("prunable", sample_id, measured["prunable"])
