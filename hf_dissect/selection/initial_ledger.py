"""Scores of an earlier run at the beginning of a run, in place of a warm-up."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hf_dissect.selection.ledger import SampleLedger, SavedLedger
from hf_dissect.selection.strategy import SelectionStrategy

logger = logging.getLogger(__name__)

_FEW = 0.5  # share of the pairs


def begin_with_scores(
    ledger: SampleLedger,
    scores: SavedLedger,
    strategy: SelectionStrategy,
    source: str,
    known: torch.Tensor | np.ndarray | Sequence[int] | None = None,
) -> None:
    """Fill the ledger of a run with the scores of another run.

    Args:
        ledger: Ledger to fill.
        scores: Scores of the same pairs.
        strategy: Strategy of the run.
        source: Name of the scores in messages.
        known: Ids of the training pairs, int64 `(n,)`; None for row numbers, or if the ids are unknown.

    Raises:
        ValueError: The scores belong to other data, or the run uses none of their columns.
    """
    check_same_pairs(source, scores, ledger, known)
    taken = fill_ledger(ledger, scores, strategy.stand_ins)
    if not taken:
        raise ValueError(
            f"selection.ledger {source!r} has the columns {', '.join(scores.columns)}, and this run keeps none of "
            f"them ({', '.join(ledger.columns)})."
        )
    logger.info("The ledger begins with %s of %d pairs from %s.", ", ".join(taken), len(scores.ids), source)
    warmup = getattr(strategy, "warmup_epochs", 0)
    if warmup and set(strategy.columns) & set(taken):
        logger.warning(
            "selection.ledger: the first %d epochs warm up and overwrite what it brings; set selection.warmup_epochs "
            "to 0 to select from the first step on.",
            warmup,
        )


def check_same_pairs(
    source: str,
    scores: SavedLedger,
    ledger: SampleLedger,
    known: torch.Tensor | np.ndarray | Sequence[int] | None = None,
) -> None:
    """Check that scores belong to the training pairs.

    Args:
        source: Name of the scores in messages.
        scores: Scores to check.
        ledger: Ledger of the run.
        known: Ids of the training pairs, int64 `(n,)`; None for row numbers, or if the ids are unknown.

    Raises:
        ValueError: The ids are of another kind, the numbers of pairs differ, or no id is shared.
    """
    if (scores.num_samples is None) != (ledger.num_samples is None):
        kinds = ("keys (data.id_column)", "row numbers")
        theirs, ours = (kinds[one.num_samples is not None] for one in (scores, ledger))
        raise ValueError(
            f"selection.ledger {source!r} knows pairs by {theirs}, this run by {ours}; set data.id_column as in the "
            "run that wrote it."
        )
    if scores.num_samples != ledger.num_samples:
        raise ValueError(
            f"selection.ledger {source!r} is of {scores.num_samples} pairs, the training data are "
            f"{ledger.num_samples}: another data set, split or caption column, "
            "or data.max_train_rows or data.noise_kind differs."
        )
    if known is None:
        return
    shared = torch.isin(torch.as_tensor(known), scores.ids).float().mean().item()
    if shared == 0:
        raise ValueError(
            f"selection.ledger {source!r} knows none of the {len(known)} training pairs: it belongs to another data "
            "set, or data.id_column names another column than in the run that wrote it."
        )
    if shared < _FEW:
        logger.warning("selection.ledger: only %.0f %% of the training pairs have scores in %s.", 100 * shared, source)


def fill_ledger(ledger: SampleLedger, scores: SavedLedger, stand_ins: Mapping[str, str]) -> list[str]:
    """Write scores into a ledger.

    Args:
        ledger: Ledger to fill.
        scores: Scores of the same pairs, see `check_same_pairs`.
        stand_ins: Columns of `scores` to use for columns that `scores` do not have, by the name of the latter.

    Returns:
        Names of the columns that were written.
    """
    taken = []
    for name in ledger.columns:
        source = name if name in scores.columns else stand_ins.get(name)
        if source in scores.columns:
            ledger.write(name, scores.ids, scores.columns[source])
            taken.append(name)
    return taken
