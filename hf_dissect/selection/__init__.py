"""Sample selection: the rules, the ledger of each pair's past, and the scoring of candidates."""

from typing import Any

from hf_dissect.selection.clipscore import ClipScore
from hf_dissect.selection.dissect import Dissect
from hf_dissect.selection.gsc import Gsc
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.loss_rank import BigLoss, SmallLoss
from hf_dissect.selection.ncr import Ncr
from hf_dissect.selection.scoring import CandidateScores, correlation_of, score
from hf_dissect.selection.soft_labels import SoftLabels
from hf_dissect.selection.strategy import SCOPES, Selection, SelectionStrategy
from hf_dissect.selection.uniform import KeepAll, Random

STRATEGIES: dict[str, type[SelectionStrategy]] = {
    strategy.name: strategy for strategy in (Dissect, Random, SmallLoss, BigLoss, ClipScore, Ncr, Gsc, KeepAll)
}


def make_strategy(name: str, **options: Any) -> SelectionStrategy:
    """Build a strategy by its name in recipes, e.g. `make_strategy("dissect", variant="momentum")`.

    Args:
        name: Name of the strategy.
        **options: Arguments of its class.

    Raises:
        ValueError: If the name is unknown, or the strategy does not take one of the options.
    """
    if name not in STRATEGIES:
        raise ValueError(f"selection_strategy={name!r}: choose one of {', '.join(STRATEGIES)}.")
    try:
        return STRATEGIES[name](**options)
    except TypeError as error:
        raise ValueError(f"selection_options={options!r}: {error}.") from error


__all__ = [
    "SCOPES",
    "STRATEGIES",
    "CandidateScores",
    "SampleLedger",
    "Selection",
    "SelectionStrategy",
    "SoftLabels",
    "correlation_of",
    "make_strategy",
    "score",
]
