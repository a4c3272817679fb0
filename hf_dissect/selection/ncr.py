"""Online selection by the small-loss division of NCR, a mixture on the last epoch's losses."""

from collections.abc import Mapping

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import NcrOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.soft_labels import compute_upper_posterior
from hf_dissect.selection.strategy import SCORED_EPOCHS, Selection, SelectionStrategy, keep_largest, keep_random
from hf_dissect.settings import check_values


class Ncr(SelectionStrategy):
    """A rule that keeps the candidates most likely clean, judged by their losses of the last epoch.

    It is the division of NCR, "Learning with Noisy Correspondence for Cross-modal Matching" (NeurIPS 2021), after
    DivideMix (arXiv 2002.07394). A mixture of two Gaussians is fitted to the losses of all pairs, scaled to [0, 1],
    and the posterior of the lower component is frozen for the next epoch. NCR's two networks and its rectified soft
    margin are not part of a selection rule.

    A pair without a probability takes the median of its batch. A batch whose probabilities are all the same, or that
    has none, is selected at random.

    Args:
        warmup_epochs: Number of epochs with random subsets at first, at least 1, because the first division needs an
            epoch of losses.
        seed: See `NcrOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "ncr"
    usage = "choice"
    columns = ("loss", "p_clean")
    records_pairs_alone = True

    def __init__(self, warmup_epochs: int = 1, seed: int = NcrOptions.seed) -> None:
        super().__init__()
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs={warmup_epochs}: ncr needs at least 1 to have losses to divide.")
        check_values(NcrOptions, {"seed": seed})
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Remember the epoch; see `SelectionStrategy.on_epoch_begin`."""
        self._epoch = epoch

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` most probably clean candidates; see `SelectionStrategy.select`."""
        p_clean = ledger.read("p_clean", scores.sample_id)
        known = ~p_clean.isnan()
        if self._epoch < self.warmup_epochs or len(p_clean[known].unique()) < 2:
            return keep_random(scores.num_candidates, k, self.generator)
        return keep_largest(torch.where(known, p_clean, p_clean[known].median()), k)

    @property
    def first_planned_epoch(self) -> int:
        """First epoch, from 0, that has divided all pairs before it begins."""
        return max(SCORED_EPOCHS, self.warmup_epochs)

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Plan by the probability of being clean; see `SelectionStrategy.plan`."""
        return ledger.column("p_clean")

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

    def update(self, ledger: SampleLedger) -> None:
        """Divide the pairs by their losses; see `SelectionStrategy.update`."""
        seen, losses = ledger.find_known("loss")
        if len(seen):
            p_clean = compute_upper_posterior(-losses.numpy(), seed=self.seed)
            ledger.write("p_clean", seen, torch.from_numpy(p_clean))
            ledger.write("loss", seen, torch.full((len(seen),), torch.nan))
