"""DISSect: the pairs whose correlation fell most against their own past."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import DissectOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import SCORED_EPOCHS, Selection, SelectionStrategy, keep_largest, keep_random
from hf_dissect.settings import check_values


class Dissect(SelectionStrategy):
    """Differential-informed sample selection (ICCV 2025, arXiv 2507.12998).

    The rule keeps the candidates with the largest differential, `historical - current` correlation. Clean pairs are
    learnt early and fall back later; mismatched ones start low and rise as they are memorised.

    A pair without history takes the median differential of its batch. A batch without any history is selected at
    random, because a first visit contains no information about a pair.

    Args:
        variant, momentum, warmup_on: See `DissectOptions`.
        warmup_epochs: Number of epochs before the selection proper (`"warmup"` only), at least 1 unless the ledger
            starts with a history.
        history_given: True if the ledger starts with the history of another run.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    name = "dissect"
    columns = ("history",)
    stand_ins: ClassVar[Mapping[str, str]] = {"history": "correlation"}

    def __init__(
        self,
        variant: str = DissectOptions.variant,
        warmup_epochs: int = 1,
        warmup_on: str = DissectOptions.warmup_on,
        momentum: float = DissectOptions.momentum,
        history_given: bool = False,
    ) -> None:
        super().__init__()
        check_values(DissectOptions, {"variant": variant, "momentum": momentum, "warmup_on": warmup_on})
        if variant == "warmup" and warmup_epochs < 1 and not history_given:
            raise ValueError(
                f"warmup_epochs={warmup_epochs}: the warm-up variant needs at least 1 to have a history, or the "
                "ledger of another run to start with."
            )
        self.variant = variant
        self.warmup_epochs = warmup_epochs if variant == "warmup" else 0
        self.warmup_on = warmup_on
        self.momentum = momentum
        self._epoch = 0

    @property
    def in_warmup(self) -> bool:
        """True before the selection proper."""
        return self._epoch < self.warmup_epochs

    def needs_scores(self, epoch: int) -> bool:
        # Each warm-up epoch overwrites the scores of the one before, so only the last is worth its forward passes.
        """Return True from the last warm-up epoch on."""
        return epoch >= self.warmup_epochs - 1

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Remember the epoch; see `SelectionStrategy.on_epoch_begin`."""
        self._epoch = epoch

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest differentials; see `SelectionStrategy.select`."""
        if self.in_warmup:
            if self.warmup_on == "all":
                return Selection(indices=torch.arange(scores.num_candidates))
            return keep_random(scores.num_candidates, k, self.generator)
        differential = ledger.read("history", scores.sample_id) - scores.correlation
        known = ~differential.isnan()
        if not known.any():
            return keep_random(scores.num_candidates, k, self.generator)
        return keep_largest(torch.where(known, differential, differential[known].median()), k)

    @property
    def first_planned_epoch(self) -> int:
        """First epoch, from 0, that knows a score after the history of the warm-up."""
        return max(SCORED_EPOCHS, self.warmup_epochs + 1)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the differential of the history and the last score; see `SelectionStrategy.plan`."""
        return ledger.column("history") - ledger.column("correlation")

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Update the history; see `SelectionStrategy.record`."""
        if self.variant == "momentum":
            history = ledger.read("history", sample_id)
            average = self.momentum * history + (1 - self.momentum) * correlation
            ledger.write("history", sample_id, torch.where(history.isnan(), correlation, average))
        elif self.in_warmup:
            ledger.write("history", sample_id, correlation)
