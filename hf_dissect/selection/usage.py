"""Penalty of usage: pairs that have trained often are less likely to be kept again, whatever the strategy."""

from collections.abc import Mapping

import torch

from hf_dissect.selection.inclusion import find_inclusion, sample_systematically
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import OPTIONS, find_usage_problem
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import VISITS_COLUMN, Selection, SelectionStrategy, keep_largest


def set_usage_penalty(strategy: SelectionStrategy, penalty: float) -> None:
    """Let a strategy count the visits of the pairs, and penalise them.

    Args:
        strategy: Strategy of a run.
        penalty: Strength, at least 0; 0 leaves the strategy as it is.

    Raises:
        ValueError: The penalty is negative, or the strategy does not take one.
    """
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"usage_penalty={penalty}: must be a number of at least 0.")
    if not penalty:
        return
    if not strategy.usage:
        problem = find_usage_problem(strategy.name, ratio=0.5, rescore_every=1)
        own = (
            ""
            if strategy.name in OPTIONS
            else "; a strategy of your own says by its attribute `usage` how it takes it"
        )
        raise ValueError(f"usage_penalty={penalty} {problem}{own}.")
    strategy.usage_penalty = float(penalty)
    columns = tuple(dict.fromkeys((*strategy.columns, VISITS_COLUMN)))
    strategy.columns = columns  # type: ignore[misc]  # a class variable of strategies without a penalty


def choose_pairs(strategy: SelectionStrategy, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
    """Choose `k` candidates by a strategy, and by how often they have trained if there is a penalty.

    A ranking is that of the priorities minus `penalty * log(1 + visits)`, in units of the standard deviation of the
    priorities in the batch. A random choice becomes a draw with probabilities in proportion to
    `(1 + visits) ** -penalty`. A strategy that draws pairs does so itself, see `SelectionStrategy.find_handicap`.

    Args:
        strategy: Strategy of the run.
        scores: Scores of the `B` candidates.
        ledger: Ledger of the run.
        k: Number of candidates to keep.
    """
    selection = strategy.select(scores, ledger, k)
    if not strategy.usage_penalty or strategy.usage != "choice" or len(selection.indices) == scores.num_candidates:
        return selection
    handicap = strategy.find_handicap(scores.sample_id, ledger)
    if selection.priority is not None:
        priority = selection.priority.float().cpu()
        chosen = keep_largest(priority - handicap * measure_spread(priority), k)
        return Selection(chosen.indices, priority=chosen.priority)
    inclusion = find_inclusion((-handicap.double()).exp(), k)
    return Selection(sample_systematically(inclusion, strategy.generator))


def measure_spread(priority: torch.Tensor) -> float:
    """Return the standard deviation of the finite priorities `(n,)`; 1 if all of them are the same."""
    finite = priority[priority.isfinite()].double()
    spread = float(finite.std(correction=0)) if len(finite) else 0.0
    scale = float(finite.abs().max()) if len(finite) else 0.0
    return spread if spread > 1e-6 * scale else 1.0


def penalise_plan(strategy: SelectionStrategy, ledger: SampleLedger, column: str) -> None:
    """Subtract the penalty from the planned values of all pairs; every rank calls this function.

    Args:
        strategy: Strategy of the run.
        ledger: Ledger of the run.
        column: Column of the planned values.
    """
    if not strategy.usage_penalty:
        return
    strength = strategy.usage_penalty * measure_spread(ledger.find_known(column)[1])

    def subtract(pairs: SampleLedger) -> torch.Tensor:
        return pairs.column(column) - strength * pairs.column(VISITS_COLUMN).nan_to_num(0.0).log1p()

    ledger.replace_computed(column, subtract)


def read_visits(strategy: SelectionStrategy, ledger: SampleLedger, sample_id: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `visits`, how often pairs have trained before, float32 `(n,)`; nothing without a penalty."""
    if not strategy.usage_penalty:
        return {}
    return {"visits": ledger.read(VISITS_COLUMN, sample_id).nan_to_num(0.0)}


def count_visits(sample_id: torch.Tensor, columns: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
    """Count a visit of each pair that trains, in a ledger that holds the pairs.

    Args:
        sample_id: Ids of the pairs, int64 `(n,)`; an id that is there twice trains twice.
        columns: Not used.
        ledger: Ledger to write to.
    """
    trained, times = sample_id.unique(return_counts=True)
    before = ledger.read(VISITS_COLUMN, trained).nan_to_num(0.0)
    ledger.write(VISITS_COLUMN, trained, before + times)
