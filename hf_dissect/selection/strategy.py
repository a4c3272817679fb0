"""The contract of a selection rule: scores and history in, the candidates worth a gradient out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_dissect.losses.contrastive import Weigh
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.opinion import Opinion
from hf_dissect.selection.past_model import PastModel
from hf_dissect.selection.scoring import CandidateScores

VISITS_COLUMN = "visits"
"""Ledger column with the number of times that a pair has trained, in runs with a penalty of usage."""
SCORED_EPOCHS = 2
"""Number of epochs that score every candidate before a plan decides, until the model that scores is of use."""


@dataclass(frozen=True)
class Selection:
    """The candidates that train.

    Attributes:
        indices: Positions in the candidate batch, int64 `(k,)`, ascending.
        weights: Factors of the per-pair losses, float32 `(k,)`; None for equal weights.
        priority: Values that the rule ranked by, float32 `(B,)`, larger is better; None if it did not rank.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    priority: torch.Tensor | None = None


class SelectionStrategy:
    """Base class of the rules, which see scores and the ledger, never the model or the trainer.

    A new rule is one file with one subclass, and a line each in `hf_dissect.selection.strategies` and `options`.

    Attributes:
        name: Name of the rule in recipes and arguments.
        columns: Ledger columns of the rule, in addition to the `correlation` that is always recorded.
        stand_ins: Column that replaces an own column if a run starts with the ledger of another rule.
        keeps_all: True if every candidate trains, so that the selection ratio has no effect.
        samples: True if `plan` returns weights that pairs are drawn in proportion to; False if the pairs of a block
            with the largest values train.
        plan_columns: Further ledger columns that `plan` reads; `evidence` is written by the selector.
        why_no_plan: Reason why a rule without `plan` has none, for an error.
        reference: Use of a reference model. "": none. "stored": its scores are put in the ledger before the first
            step (`measure_reference`), and for a stream, it scores every batch. "batch": it scores every batch.
            "before": its scores must be in the ledger before the first step.
        past_model: Copy of the model from earlier steps that scores the candidates, too; None without one.
        warmup: What the steps of a warm-up do, for a warning.
        records_pairs_alone: True if `record` writes values of a pair that depend on this pair alone, so that the pairs
            may come in parts, and a ledger that is split over the processes will do. It counts for the class whose
            `record` it stands next to.
        usage: How the rule takes a penalty of usage. "choice": pairs are chosen again by the priorities of the
            selection, or at random if it has none; "draw": the rule reads `find_handicap` itself; "": it takes none.
        usage_penalty: Strength of this penalty; 0 without it.
        repair_strength: Strength of the repair of mismatched pairs in the current step, see
            `hf_dissect.objectives.repair`; 0 without it.
        generator: Source of random choices. It is seeded from the run's seed and the step before each call of
            `select`, so that a resumed run chooses like an uninterrupted one, and the random stream of the training is
            not touched.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    stand_ins: ClassVar[Mapping[str, str]] = {}
    keeps_all: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    plan_columns: ClassVar[tuple[str, ...]] = ()
    why_no_plan: ClassVar[str] = "it has no method plan"
    reference: ClassVar[str] = ""
    warmup: ClassVar[str] = "train on a random subset"
    records_pairs_alone: ClassVar[bool] = True
    usage: ClassVar[str] = ""
    usage_penalty: float = 0.0
    repair_strength: float = 0.0

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.past_model: PastModel | None = None

    def needs_scores(self, epoch: int) -> bool:
        """Return True if candidates of an epoch (counted from 0) must be scored before they are selected."""
        return True

    def update(self, ledger: SampleLedger) -> None:
        """Update values for a whole epoch, such as labels, from the rule's own ledger columns.

        This is called exactly once an epoch from the second on, before `on_epoch_begin`, on every rank with the same
        ledger. It is not called when a run resumes in the middle of an epoch. Statistics of all pairs come from
        `ledger.find_known`, in an order that does not depend on the number of ranks.

        Args:
            ledger: Ledger to read from and write to.
        """

    def on_epoch_begin(self, epoch: int, ledger: SampleLedger) -> None:
        """Prepare for an epoch; called at its start, and when a run resumes in its middle.

        Args:
            epoch: Epoch, counted from 0.
            ledger: Ledger to read from.
        """

    def begin_run(self, num_steps: int) -> None:
        """Begin a run, before a saved state is loaded.

        Args:
            num_steps: Number of optimiser steps of the run.
        """

    def choose_ratio(self, ratio: float) -> float:
        """Return the selection ratio of the next selection, the same on every rank, from that of the settings."""
        return ratio

    def begin_step(self) -> None:
        """Begin an optimiser step, of one selection or more; called on every rank."""

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Choose `k` of the `B` candidates.

        Args:
            scores: Scores of the candidates; only `sample_id` is set if `needs_scores` returned False.
            ledger: Ledger with the values of earlier visits; read-only here.
            k: Number of candidates to keep, `1 <= k <= B`.

        Returns:
            The selected candidates.
        """
        raise NotImplementedError

    def find_handicap(self, sample_id: torch.Tensor, ledger: SampleLedger) -> torch.Tensor:
        """Return `usage_penalty * log(1 + visits)` of pairs, which lowers the logarithm of their chance.

        Args:
            sample_id: Ids of the pairs, int64 `(B,)`.
            ledger: Ledger with the visits of the pairs.

        Returns:
            Handicaps, float32 `(B,)` on the CPU; 0 without a penalty.
        """
        if not self.usage_penalty:
            return torch.zeros(len(sample_id))
        return self.usage_penalty * ledger.read(VISITS_COLUMN, sample_id).nan_to_num(0.0).log1p()

    def read_opinion(self, ledger: SampleLedger, batch: Mapping[str, torch.Tensor]) -> Opinion | None:
        """Return what the rule believes of the pairs that train in a step; None of a rule without an opinion.

        Args:
            ledger: Ledger of the run.
            batch: Batch of `b` pairs, with `sample_id` int64 `(b,)` and `pair_weight` `(b,)`.
        """
        return None

    @property
    def can_plan(self) -> bool:
        """True if the rule can choose pairs by the ledger alone, before they are loaded."""
        return type(self).plan is not SelectionStrategy.plan

    @property
    def first_planned_epoch(self) -> int:
        """First epoch, from 0, whose pairs are chosen by `plan` and not by `select`."""
        return SCORED_EPOCHS

    def plan(self, ledger: SampleLedger) -> torch.Tensor:
        """Return what the rule ranks all pairs by in an epoch, from the ledger alone.

        It is called at the beginning of an epoch, after `update` and `on_epoch_begin`, with `selection_rescore_every`
        above 1. The values are frozen for the epoch.

        Args:
            ledger: Ledger with the values of earlier visits; read-only here.

        Returns:
            Values, float32 `(len(ledger),)`, in the order of `ledger.column`: larger is better, or weights of at least
            0 if the rule `samples`. NaN for a pair that the ledger does not know.
        """
        raise NotImplementedError

    def reweigh(self, planned: torch.Tensor, inclusion: torch.Tensor) -> Weigh | None:
        """Return the factors of the losses of pairs that were drawn by `plan`, if they follow from these losses, too.

        Args:
            planned: Planned values of the `k` pairs, float32 `(k,)`; NaN for pairs that the ledger did not know.
            inclusion: Probabilities with which they were chosen, float32 `(k,)`, above 0.

        Returns:
            Function from the losses of the step to factors; None for the planned weights over the probabilities.
        """
        return None

    def summarize(self, measured: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return sums over the own candidates of a selection, which `observe` receives of all ranks.

        Args:
            measured: Values that `measure` returned, of the candidates of this rank; empty if it was not called.

        Returns:
            Sums, float64 `(m,)`, as many on every rank; None for none.
        """
        return None

    def summarize_block(self, sample_id: torch.Tensor, ledger: SampleLedger) -> torch.Tensor | None:
        """Return sums over a whole block of candidates of which `plan` chose, which `observe` receives of all ranks.

        Args:
            sample_id: Ids of the candidates of this rank, also of those that were not loaded, int64 `(n,)`.
            ledger: Ledger with the newest values; read-only here.

        Returns:
            Sums, float64 `(m,)`, as many on every rank; None for none.
        """
        return None

    def observe(self, sums: torch.Tensor) -> None:
        """Receive the sums `(m,)` over the candidates of all ranks, the same on every rank, before the next step."""

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Measure further values of each scored candidate, for `record` to receive from all ranks.

        Args:
            scores: Scores of the candidates: those of this rank with the selection scope "local", of all ranks with
                "global".
            ledger: Ledger with the values of earlier visits; read-only here.

        Returns:
            Values by name, float32 `(B,)` on the CPU.
        """
        return {}

    def measure_reference(self, scores: CandidateScores) -> Mapping[str, torch.Tensor]:
        """Measure values of pairs under the reference model for the ledger, before the first step.

        Args:
            scores: Scores by the reference of a shuffled batch of pairs, as large as a batch of candidates.

        Returns:
            Values by ledger column, float32 `(B,)` on the CPU.
        """
        return {}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Update the rule's own ledger columns after a selection, or after a training step of unscored pairs.

        Args:
            sample_id: Ids of the candidates of all ranks, int64 `(n,)`; of a ledger that is split over the processes,
                of those that belong to this one.
            correlation: Correlations of these candidates, float32 `(n,)`.
            ledger: Ledger of these candidates to write to.
            measured: Values that `measure` returned, `(n,)` each; empty or None if it was not called, because the
                pairs were not scored or a rank had no candidates.
        """

    def pop_logs(self) -> dict[str, float]:
        """Return figures of the rule since the last call, for the logs of training."""
        return {}

    def compute_figures(self) -> dict[str, float]:
        """Return figures of the rule for `metrics.json`, such as an estimated share of mismatched pairs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule that is not in the ledger, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


def records_each_pair_alone(strategy: SelectionStrategy) -> bool:
    """Return True if the class that defines `record` of a strategy says that it records each pair alone."""
    kind = next(kind for kind in type(strategy).__mro__ if "record" in vars(kind))
    return bool(vars(kind).get("records_pairs_alone", False)) and strategy.reference != "before"


def keep_largest(priority: torch.Tensor, k: int) -> Selection:
    """Keep the `k` largest values of priorities `(B,)`; the earlier of equal candidates comes first."""
    order = torch.argsort(priority, descending=True, stable=True)
    return Selection(indices=order[:k].sort().values, priority=priority)


def keep_largest_known(priority: torch.Tensor, k: int, generator: torch.Generator) -> Selection:
    """Keep the `k` largest values; NaN counts as the median, and without any other value, the choice is random."""
    known = ~priority.isnan()
    if not known.any():
        return keep_random(len(priority), k, generator)
    return keep_largest(torch.where(known, priority, priority[known].median()), k)


def keep_random(num_candidates: int, k: int, generator: torch.Generator) -> Selection:
    """Keep `k` candidates, chosen uniformly without replacement."""
    return Selection(indices=torch.randperm(num_candidates, generator=generator)[:k].sort().values)
