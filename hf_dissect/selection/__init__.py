"""Selection of the candidates that are worth a gradient: the ledger, the scores, the strategies and the selector."""

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores, correlation_of, score
from hf_dissect.selection.selector import LoopHooks, OnlineSelector
from hf_dissect.selection.soft_labels import SoftLabels
from hf_dissect.selection.strategies import STRATEGIES, make_strategy
from hf_dissect.selection.strategy import SCOPES, Selection, SelectionStrategy

__all__ = [
    "SCOPES",
    "STRATEGIES",
    "CandidateScores",
    "LoopHooks",
    "OnlineSelector",
    "SampleLedger",
    "Selection",
    "SelectionStrategy",
    "SoftLabels",
    "correlation_of",
    "make_strategy",
    "score",
]
