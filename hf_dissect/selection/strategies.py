"""Strategies, by the names that recipes and arguments use."""

from typing import Any

from hf_dissect.selection.clipscore import ClipScore
from hf_dissect.selection.coreset import Coreset
from hf_dissect.selection.dissect import Dissect
from hf_dissect.selection.divbs import DivBS
from hf_dissect.selection.forgetting import Forgetting
from hf_dissect.selection.gsc import Gsc
from hf_dissect.selection.info_batch import InfoBatch
from hf_dissect.selection.jest import Jest
from hf_dissect.selection.learnability import Learnability
from hf_dissect.selection.loss_rank import BigLoss, SmallLoss
from hf_dissect.selection.ncr import Ncr
from hf_dissect.selection.noisy_channel import NoisyChannelSampling
from hf_dissect.selection.rho import Rho
from hf_dissect.selection.scan import Scan
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.uniform import KeepAll, Random
from hf_dissect.selection.usage import set_usage_penalty

STRATEGIES: dict[str, type[SelectionStrategy]] = {
    strategy.name: strategy
    for strategy in (
        *(Dissect, Random, SmallLoss, BigLoss, ClipScore, Ncr, Gsc),
        *(InfoBatch, Scan, DivBS, Forgetting),
        *(NoisyChannelSampling, Learnability, Rho, Jest, Coreset),
        KeepAll,
    )
}


def make_strategy(name: str, usage_penalty: float = 0.0, **options: Any) -> SelectionStrategy:
    """Build a strategy by its name, such as `make_strategy("dissect", variant="momentum")`.

    Args:
        name: Name of the strategy, a key of `STRATEGIES`.
        usage_penalty: Strength by which pairs that have trained often are less likely to be kept again.
        options: Keyword arguments of the strategy.

    Raises:
        ValueError: The name is unknown, or the strategy does not accept one of the options or a penalty.
    """
    if name not in STRATEGIES:
        raise ValueError(f"selection_strategy={name!r}: choose one of {', '.join(STRATEGIES)}.")
    try:
        strategy = STRATEGIES[name](**options)
    except TypeError as error:
        raise ValueError(f"selection_options={options!r}: {error}.") from error
    set_usage_penalty(strategy, usage_penalty)
    return strategy
