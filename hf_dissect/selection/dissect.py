"""DISSect: the pairs whose correlation fell most against their own past."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import DissectOptions, find_unused_option
from hf_dissect.selection.past_model import PastModel
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import SCORED_EPOCHS, Selection, SelectionStrategy, keep_largest_known, keep_random
from hf_dissect.settings import check_values


class Dissect(SelectionStrategy):
    """Differential-informed sample selection (ICCV 2025, arXiv 2507.12998).

    The rule keeps the candidates with the largest differential, `historical - current` correlation. Clean pairs are
    learnt early and fall back later; mismatched ones start low and rise as they are memorised.

    A pair without history takes the median differential of its batch. A batch without any history is selected at
    random, because a first visit contains no information about a pair.

    With `history` "average" or "snapshot", the historical correlation is that by an earlier state of the model, a
    moving average or a snapshot of its weights (`PastModel`), so that pairs that are seen once have a history, too.
    That is ours, not the paper's. `variant` and `warmup_epochs` then have no effect; the ledger column holds the last
    such score of a pair.

    Args:
        variant, momentum, warmup_on, history, average_momentum, model_warmup_steps, snapshot_every: See
            `DissectOptions`.
        warmup_epochs: Number of epochs before the selection proper (`"warmup"` only), at least 1 unless the ledger
            starts with a history.
        history_given: True if the ledger starts with the history of another run.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    name = "dissect"
    usage = "choice"
    columns = ("history",)
    records_pairs_alone = True
    stand_ins: ClassVar[Mapping[str, str]] = {"history": "correlation"}

    def __init__(
        self,
        variant: str = DissectOptions.variant,
        warmup_epochs: int = 1,
        warmup_on: str = DissectOptions.warmup_on,
        momentum: float = DissectOptions.momentum,
        history_given: bool = False,
        history: str = DissectOptions.history,
        average_momentum: float = DissectOptions.average_momentum,
        model_warmup_steps: int = DissectOptions.model_warmup_steps,
        snapshot_every: int | None = DissectOptions.snapshot_every,
    ) -> None:
        super().__init__()
        given = {"variant": variant, "momentum": momentum, "warmup_on": warmup_on, "history": history}
        of_model = {
            "average_momentum": average_momentum,
            "model_warmup_steps": model_warmup_steps,
            "snapshot_every": snapshot_every,
        }
        check_values(DissectOptions, given | of_model)
        if problem := find_unused_option(given | of_model):
            raise ValueError(f"{problem[0]}={problem[1]}.")
        if history != "ledger":
            self.past_model = PastModel(history, average_momentum, model_warmup_steps, snapshot_every)
            variant, warmup_epochs = "model", 0
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
        return epoch >= self.warmup_epochs - 1 if self.past_model is None else self.past_model.is_ready

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Remember the epoch; see `SelectionStrategy.on_epoch_begin`."""
        self._epoch = epoch

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` largest differentials; see `SelectionStrategy.select`."""
        if self.in_warmup:
            return self._keep_in_warmup(scores.num_candidates, k)
        if self.past_model is None:
            history = ledger.read("history", scores.sample_id)
        elif scores.past_correlation is not None:
            history = scores.past_correlation
        else:
            return self._keep_in_warmup(scores.num_candidates, k)
        return keep_largest_known(history - scores.correlation, k, self.generator)

    def _keep_in_warmup(self, num_candidates: int, k: int) -> Selection:
        if self.warmup_on == "all":
            return Selection(indices=torch.arange(num_candidates))
        return keep_random(num_candidates, k, self.generator)

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure the score by the earlier model, if there is one; see `SelectionStrategy.measure`."""
        return {} if scores.past_correlation is None else {"history": scores.past_correlation}

    why_no_plan = "an earlier model has to score the candidates (history: average or snapshot)"

    @property
    def can_plan(self) -> bool:
        """True if the history is in the ledger."""
        return self.past_model is None

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
        if measured and "history" in measured:
            ledger.write("history", sample_id, measured["history"])
        elif self.variant == "momentum":
            history = ledger.read("history", sample_id)
            average = self.momentum * history + (1 - self.momentum) * correlation
            ledger.write("history", sample_id, torch.where(history.isnan(), correlation, average))
        elif self.in_warmup:
            ledger.write("history", sample_id, correlation)
