"""Online selection by InfoBatch: pairs with a small loss are dropped at random, and those that stay weigh more."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_dissect.selection.inclusion import find_inclusion, sample_systematically
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import InfoBatchOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy
from hf_dissect.settings import check_values


class InfoBatch(SelectionStrategy):
    """Unbiased dynamic pruning (InfoBatch, ICLR 2024, arXiv 2303.04947).

    A pair whose loss at its last visit lies below the mean of all known losses stays with the probability `1 - r`,
    every other pair stays, and the gradient of a pair that stays below the mean is scaled by `1 / (1 - r)`. The mean
    is taken once an epoch. All candidates train in the last part of the run, which removes what variance is left.

    The paper prunes a varying number of pairs. A step here trains exactly `k`, the same number on every rank: pairs
    below and above the mean are included with probabilities in the ratio `1 - r : 1`, at most 1, that sum to `k`
    (systematic sampling), and weigh `k / B` over their probability. So the pairs below the mean still weigh
    `1 / (1 - r)` times as much where no probability is capped, and the expected loss of a step is always the mean over
    all `B` candidates, as before and after the pruning. A pair without a loss counts as above the mean, as in the
    paper; in the first epoch, the choice is uniform.

    Args:
        prune_probability, annealing: See `InfoBatchOptions`.
        num_steps: Number of optimiser steps of the run, for a loop of your own; `begin_run` sets it. Without it, no
            part of the run trains on all candidates.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "info_batch"
    usage = "draw"
    columns = ("loss",)
    records_pairs_alone = True

    def __init__(
        self,
        prune_probability: float = InfoBatchOptions.prune_probability,
        annealing: float = InfoBatchOptions.annealing,
        num_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_values(InfoBatchOptions, {"prune_probability": prune_probability, "annealing": annealing})
        self.prune_probability = prune_probability
        self.annealing = annealing
        self.num_steps = num_steps
        self._step = 0
        self._mean_loss = float("nan")

    @property
    def is_annealed(self) -> bool:
        """True in the last part of the run, where all candidates train."""
        return self.num_steps is not None and self._step > self.annealing * self.num_steps

    def begin_run(self, num_steps: int) -> None:
        """Begin a run; see `SelectionStrategy.begin_run`."""
        self.num_steps, self._step = num_steps, 0

    def begin_step(self) -> None:
        """Count the optimiser steps; see `SelectionStrategy.begin_step`."""
        self._step += 1

    def needs_scores(self, epoch: int) -> bool:
        """Return True until the part of the run where all candidates train."""
        return not self.is_annealed

    def choose_ratio(self, ratio: float) -> float:
        """Return 1 in the last part of the run; see `SelectionStrategy.choose_ratio`."""
        return 1.0 if self.is_annealed else ratio

    def update(self, ledger: SampleLedger) -> None:
        """Take the mean of the losses; see `SelectionStrategy.update`."""
        self._mean_loss = ledger.compute_mean("loss")

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Draw `k` candidates, with weights; see `SelectionStrategy.select`."""
        is_below = ledger.read("loss", scores.sample_id) < self._mean_loss  # False for a loss that is not known
        chance = torch.where(is_below, 1 - self.prune_probability, 1.0)
        chance = chance * (-self.find_handicap(scores.sample_id, ledger)).exp()
        inclusion = find_inclusion(chance, k)
        indices = sample_systematically(inclusion, self.generator)
        weights = (k / scores.num_candidates) / inclusion[indices]
        return Selection(indices=indices, weights=weights.float())

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure the loss of each candidate; see `SelectionStrategy.measure`."""
        return {"loss": scores.loss}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Record the losses; see `SelectionStrategy.record`."""
        if measured:
            ledger.write("loss", sample_id, measured["loss"])

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps so far and the mean of the losses."""
        return {"step": self._step, "mean_loss": None if self._mean_loss != self._mean_loss else self._mean_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._step = state["step"]
        self._mean_loss = float("nan") if state["mean_loss"] is None else state["mean_loss"]
