"""Plan of an epoch: what the ledger holds about each pair, frozen, so that pairs can be left out before loading."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hf_dissect.selection.block_choice import BlockRule
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.usage import penalise_plan

PLAN_COLUMN, PLAN_BEFORE = "planned", "planned_before"


class PlanReader(Protocol):
    """Place where the loading of the data reads the plan.

    Attributes:
        lag: Number of batches that are prepared ahead, for which an earlier plan holds.
    """

    lag: int

    def position(self) -> int:
        """Return the number of batches that were read so far."""

    def publish(self, epoch: int | None, ledger: SampleLedger, begun: Sequence[int | None]) -> None:
        """Follow the plans in the ledger from now on.

        Args:
            epoch: Epoch, from 0; None to load all pairs.
            ledger: Ledger with the plans.
            begun: Number of batches that were read when the plan before the last and the last were made.
        """


class LedgerPlan:
    """Planner of the epochs of a run, whose decisions are a column of the ledger and so in every checkpoint.

    At the beginning of an epoch it freezes the value that the strategy ranks each pair by. Data workers run ahead of
    the training, and a resumed run repeats their choices: both need values that do not move within the epoch.

    Args:
        strategy: Strategy of the run, which can plan.
        ratio: Selection ratio.
        rescore_every: Number `m`; of the pairs that do not train, a share of `1 / m` is scored again, `m > 1`.
        seed: Seed of the random choices.
        keeps_before: True to keep the plan before the last, too, for workers that read ahead of an epoch.

    Attributes:
        columns: Ledger columns of the plan.
        rule: `BlockRule` of the choice in a block.
        reader: Place where the loading of the data reads the plan; None as long as nothing is loaded by it.
    """

    def __init__(
        self, strategy: SelectionStrategy, ratio: float, rescore_every: int, seed: int, keeps_before: bool = False
    ) -> None:
        check_plannable(strategy, rescore_every)
        self.strategy = strategy
        scores = any(strategy.needs_scores(epoch) for epoch in range(strategy.first_planned_epoch + 1))
        self.rule = BlockRule(ratio, rescore_every, strategy.samples, scores, seed)
        self.columns = (PLAN_COLUMN, *((PLAN_BEFORE,) if keeps_before else ()), *strategy.plan_columns)
        self.reader: PlanReader | None = None
        self._planned_epoch: int = -1
        self._begun: tuple[int | None, int | None] = (None, None)
        self.reset()

    def begin_epoch(self, epoch: int, ledger: SampleLedger) -> None:
        """Freeze the plan of an epoch that begins, or publish that of an epoch that continues.

        Args:
            epoch: Epoch, from 0.
            ledger: Ledger of the run.
        """
        is_planned = epoch >= self.strategy.first_planned_epoch
        if is_planned and epoch != self._planned_epoch:
            self._planned_epoch = epoch
            self._freeze(ledger)
        if self.reader is not None:
            self.reader.publish(epoch if is_planned else None, ledger, self._begun)

    def _freeze(self, ledger: SampleLedger) -> None:
        position, lag = (0, 0) if self.reader is None else (self.reader.position(), self.reader.lag)
        last = self._begun[1]
        if last is not None and position < last + lag:
            return  # an epoch shorter than what workers read ahead, to whom the last plan does not hold yet
        if PLAN_BEFORE in ledger.columns:
            ledger.own.replace(PLAN_BEFORE, ledger.own.column(PLAN_COLUMN))
        ledger.replace_computed(PLAN_COLUMN, self.strategy.plan)
        penalise_plan(self.strategy, ledger, PLAN_COLUMN)
        self._begun = (last, position)

    def reset(self) -> None:
        """Forget the epoch that the plan was made for."""
        self._planned_epoch = -1
        self._begun = (None, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the plan, and the batches from which on plans hold; their values are in the ledger."""
        return {"planned_epoch": self._planned_epoch, "begun": list(self._begun)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; the ledger is loaded, too."""
        self._planned_epoch, self._begun = state["planned_epoch"], tuple(state["begun"])


def make_plan(
    strategy: SelectionStrategy, ratio: float, rescore_every: int, seed: int, keeps_before: bool = False
) -> LedgerPlan | None:
    """Build the plan of a run; None if every candidate is loaded and scored, or if all of them train."""
    if isinstance(rescore_every, bool) or not isinstance(rescore_every, int) or rescore_every < 1:
        raise ValueError(
            f"rescore_every={rescore_every!r}: must be an integer of at least 1; 1 scores every candidate."
        )
    if rescore_every == 1 or strategy.keeps_all:
        return None
    return LedgerPlan(strategy, ratio, rescore_every, seed, keeps_before)


def check_plannable(strategy: SelectionStrategy, rescore_every: int) -> None:
    """Check that a strategy can decide by the ledger alone.

    Raises:
        ValueError: It cannot; the message says why.
    """
    if not strategy.can_plan:
        raise ValueError(
            f"selection_rescore_every={rescore_every}: the strategy {strategy.name!r} cannot choose pairs before they "
            f"are loaded, since {strategy.why_no_plan}; set selection_rescore_every (selection.rescore_every in a "
            "recipe) to 1, or choose another strategy."
        )
