"""Lets a run begin with the scores of another one, in place of a warm-up of its own."""

import logging
from typing import TYPE_CHECKING

import torch

from hf_dissect.hub.pull import read_shared_scores
from hf_dissect.selection.ledger import SampleLedger, SavedLedger

if TYPE_CHECKING:
    from hf_dissect.trainer import DissectTrainer

logger = logging.getLogger(__name__)

_FEW = 0.5


def begin_with_ledger(trainer: "DissectTrainer", source: str) -> None:
    """Fill the trainer's ledger with the scores at `source` (see `read_shared_scores`); called on all ranks.

    Raises:
        FileNotFoundError, ValueError, HubError: there are no scores, or they are of other data.
    """
    with trainer.args.main_process_first(local=True, desc="reading the initial ledger"):
        scores = read_shared_scores(source)
    check_same_pairs(source, scores, trainer.ledger, getattr(trainer.train_dataset, "sample_ids", None))
    taken = fill(trainer.ledger, scores, trainer.strategy.stand_ins)
    if not taken:
        raise ValueError(
            f"selection.ledger {source!r} has the columns {', '.join(scores.columns)}, and this run keeps none of "
            f"them ({', '.join(trainer.ledger.columns)})."
        )
    logger.info("The ledger begins with %s of %d pairs from %s.", ", ".join(taken), len(scores.ids), source)
    warmup = getattr(trainer.strategy, "warmup_epochs", 0)
    if warmup and set(trainer.strategy.columns) & set(taken):
        logger.warning(
            "selection.ledger: the first %d epochs warm up and write over what it brings; set selection.warmup_epochs "
            "to 0 to select from the first step on.",
            warmup,
        )


def check_same_pairs(source: str, scores: SavedLedger, ledger: SampleLedger, known: object = None) -> None:
    """Make sure that scores are of the pairs that train.

    Args:
        source: what errors call the scores.
        scores: that are to be taken over.
        ledger: that is to take them.
        known: ids of the training pairs `(n,)`, where they are not the row numbers and can be told.

    Raises:
        ValueError: ids are of another kind, the numbers of pairs differ, or no id is known.
    """
    if (scores.num_samples is None) != (ledger.num_samples is None):
        kinds = ("keys (data.id_column)", "row numbers")
        theirs, ours = (kinds[one.num_samples is not None] for one in (scores, ledger))
        raise ValueError(
            f"selection.ledger {source!r} knows pairs by {theirs}, this run by {ours}; set data.id_column as the run "
            "did that wrote it."
        )
    if scores.num_samples != ledger.num_samples:
        raise ValueError(
            f"selection.ledger {source!r} is of {scores.num_samples} pairs, the training data are "
            f"{ledger.num_samples}: another data set, split or caption column, or data.max_train_rows differs."
        )
    if known is None:
        return
    found = torch.isin(torch.as_tensor(known), scores.ids).float().mean().item()
    if found == 0:
        raise ValueError(
            f"selection.ledger {source!r} knows none of the {len(known)} training pairs: it is of another data set, "
            "or data.id_column names another column than in the run that wrote it."
        )
    if found < _FEW:
        logger.warning("selection.ledger: only %.0f %% of the training pairs have scores in %s.", 100 * found, source)


def fill(ledger: SampleLedger, scores: SavedLedger, stand_ins: dict[str, str]) -> list[str]:
    """Write scores into a ledger; returns the columns that were written.

    Args:
        ledger: to write to.
        scores: of the same pairs, see `check_same_pairs`.
        stand_ins: column -> the one that is taken for it where `scores` lack it.
    """
    taken = []
    for name in ledger.columns:
        given = name if name in scores.columns else stand_ins.get(name)
        if given in scores.columns:
            ledger.write(name, scores.ids, scores.columns[given])
            taken.append(name)
    return taken
