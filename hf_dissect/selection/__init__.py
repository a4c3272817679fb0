"""Selection of the candidates that are worth a gradient: ledger, scores, strategies and selector."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_dissect.selection.ledger import SampleLedger as SampleLedger
    from hf_dissect.selection.loop_hooks import LoopHooks as LoopHooks
    from hf_dissect.selection.options import SCOPES as SCOPES
    from hf_dissect.selection.scoring import CandidateScores as CandidateScores
    from hf_dissect.selection.scoring import compute_correlation as compute_correlation
    from hf_dissect.selection.scoring import correlation_of as correlation_of
    from hf_dissect.selection.scoring import score as score
    from hf_dissect.selection.selector import OnlineSelector as OnlineSelector
    from hf_dissect.selection.soft_labels import SoftLabels as SoftLabels
    from hf_dissect.selection.strategies import STRATEGIES as STRATEGIES
    from hf_dissect.selection.strategies import make_strategy as make_strategy
    from hf_dissect.selection.strategy import Selection as Selection
    from hf_dissect.selection.strategy import SelectionStrategy as SelectionStrategy

# Imported on first use: a recipe reads the options of the strategies without torch.
_HOMES = {
    "SCOPES": "options",
    "STRATEGIES": "strategies",
    "CandidateScores": "scoring",
    "LoopHooks": "loop_hooks",
    "OnlineSelector": "selector",
    "SampleLedger": "ledger",
    "Selection": "strategy",
    "SelectionStrategy": "strategy",
    "SoftLabels": "soft_labels",
    "compute_correlation": "scoring",
    "correlation_of": "scoring",
    "make_strategy": "strategies",
    "score": "scoring",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
