"""DISSect: the pairs whose correlation fell most against their own past."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest, keep_random

VARIANTS = ("warmup", "momentum")
WARMUP_ON = ("subset", "all")


class Dissect(SelectionStrategy):
    """Differential-informed sample selection (ICCV 2025, arXiv 2507.12998).

    The rule keeps the candidates with the largest differential, `historical - current` correlation. Clean pairs are
    learnt early and fall back later; mismatched ones start low and rise as they are memorised.

    A pair without history takes the median differential of its batch. A batch without any history is selected at
    random, because a first visit contains no information about a pair.

    Args:
        variant: `"warmup"` to freeze the scores of the last warm-up epoch as the history, `"momentum"` for a moving
            average of the scores at each visit, which starts at the first one.
        warmup_epochs: Number of epochs before the selection proper (`"warmup"` only), at least 1 unless the ledger
            starts with a history.
        warmup_on: Training pairs of the warm-up: `"subset"` for a random subset of the selection ratio, `"all"` for
            all candidates.
        momentum: Share of the old value in the moving average (`"momentum"` only), in [0, 1).
        history_given: True if the ledger starts with the history of another run.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    name = "dissect"
    columns = ("history",)
    stand_ins: ClassVar[Mapping[str, str]] = {"history": "correlation"}

    def __init__(
        self,
        variant: str = "warmup",
        warmup_epochs: int = 1,
        warmup_on: str = "subset",
        momentum: float = 0.9,
        history_given: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}.")
        if warmup_on not in WARMUP_ON:
            raise ValueError(f"warmup_on={warmup_on!r}: must be one of {', '.join(WARMUP_ON)}.")
        if variant == "warmup" and warmup_epochs < 1 and not history_given:
            raise ValueError(
                f"warmup_epochs={warmup_epochs}: the warm-up variant needs at least 1 to have a history, or the "
                "ledger of another run to start with."
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be at least 0 and below 1.")
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
