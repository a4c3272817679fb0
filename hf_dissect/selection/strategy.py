"""The contract of a selection rule: scores and history in, the candidates worth a gradient out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores


@dataclass(frozen=True)
class Selection:
    """Which candidates train.

    Attributes:
        indices: int64 `(k,)`, positions in the candidate batch, ascending.
        weights: float32 `(k,)` of the per-pair losses, or None for equal weights.
        priority: float32 `(B,)`, the value the rule ranked by, larger is better; None when it ranked by nothing.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    priority: torch.Tensor | None = None


class SelectionStrategy:
    """Base class of the rules. A rule sees scores and the ledger, never the model or the trainer.

    A new rule is one file with one subclass, and a line each in `hf_dissect.selection.strategies` and `options`.

    Attributes:
        name: what recipes and arguments call it.
        columns: ledger columns it keeps, beside the `correlation` that is always recorded.
        stand_ins: own column -> the one that is taken for it where a run begins with the ledger of another rule.
        keeps_all: whether every candidate trains (the selection ratio is then without effect).
        generator: source of its random choices, seeded anew from the run's seed and the step before each call of
            `select`, so that a resumed run chooses as the uninterrupted one and the training's random stream is
            untouched.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    stand_ins: ClassVar[Mapping[str, str]] = {}
    keeps_all: ClassVar[bool] = False

    def __init__(self):
        self.generator = torch.Generator()

    def needs_scores(self, epoch: int) -> bool:
        """Whether candidates of this epoch (counted from 0) must be scored by a forward pass before selecting."""
        return True

    def update(self, ledger: SampleLedger) -> None:
        """Renew what holds for a whole epoch, such as labels, from what `record` left in the own ledger columns.

        Called exactly once an epoch from the second on, before its `on_epoch_begin`, on every rank with the same
        ledger; not at a resume in the middle of an epoch.
        """

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Told at the start of each epoch (counted from 0), and at a resume in its middle."""

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Choose `k` of the `B` candidates.

        Args:
            scores: of the candidates; only `sample_id` is set when `needs_scores` said no.
            ledger: what earlier visits left; not to be written here.
            k: how many to keep, `1 <= k <= B`.
        """
        raise NotImplementedError

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Further figures of each scored candidate, float32 `(B,)` on the CPU, that `record` is to know of all ranks.

        Args:
            scores, ledger: as of `select`: with the selection scope "local" the candidates of this rank, with "global"
                those of all.
        """
        return {}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Update the own ledger columns after a selection, or after a training step of unscored pairs.

        Args:
            sample_id, correlation: int64 and float32 `(n,)`, of the candidates of all ranks.
            ledger: to be written to, the same way on all ranks.
            measured: what `measure` gave, `(n,)` each; empty or None where it was not asked, as the pairs were not
                scored or a rank had no candidates.
        """


def keep_largest(priority: torch.Tensor, k: int) -> Selection:
    """Keep the `k` largest values of `priority` `(B,)`; of equal values the earlier candidate goes first."""
    order = torch.argsort(priority, descending=True, stable=True)
    return Selection(indices=order[:k].sort().values, priority=priority)


def keep_random(num_candidates: int, k: int, generator: torch.Generator) -> Selection:
    """Keep `k` candidates chosen uniformly without replacement."""
    return Selection(indices=torch.randperm(num_candidates, generator=generator)[:k].sort().values)
