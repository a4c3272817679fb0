"""The section of a recipe about the loss, and those of the objectives that may replace the contrastive one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_dissect.settings import list_members, list_settings, setting


@dataclasses.dataclass
class GscSection:
    """Soft labels for pairs that may be mismatched (GSC, CVPR 2024), and the loss that they weight."""

    gamma: float = setting(0.01, "Weight of the loss within the modalities.", within="[0, inf)")
    beta: float = setting(0.7, "Share of the new evidence in a label, at each epoch.", within="(0, 1]")
    temperature: float = setting(
        0.07, "Temperature of the softmax over the cosines, in place of the model's.", within="(0, inf)"
    )
    warmup_epochs: int = setting(1, "Epochs that train by the contrastive loss first.", within="[0, inf)")
    dual: bool = setting(False, "Train two networks, each with the other's labels (GSC+); costs twice as much.")
    evidence: str = setting(
        "probability",
        "Agreement of image and caption that the labels follow: probability, the softmax probability of the paper, "
        "which is small in large batches; posterior, the probability that the pair is matched, from an estimate of "
        "the share of matched pairs, and the squares of the labels as weights.",
        choices=("probability", "posterior"),
    )


@dataclasses.dataclass
class RinceSection:
    """A contrastive loss whose gradient does not grow with how wrong a pair is (RINCE, CVPR 2022)."""

    q: float = setting(
        0.01,
        "Robustness; close to 0, the gradient is that of the contrastive loss. From about 0.1 on, two towers that "
        "train from random weights may collapse.",
        within="(0, 1]",
    )
    lam: float = setting(0.05, "Weight of the sum over all pairs of the batch, lambda in the paper.", within="(0, 1]")
    temperature: float | None = setting(
        0.07,
        "Temperature of the cosines, in place of the model's; null: the model's own, which trains.",
        within="(0, inf)",
    )
    warmup_epochs: int = setting(0, "Epochs that train by the contrastive loss first.", within="[0, inf)")


@dataclasses.dataclass
class SymnceSection:
    """The contrastive loss with a reverse one added (SymNCE, 2025)."""

    beta: float = setting(0.2, "Weight of the reverse loss; at 1, both are symmetric.", within="[0, 1]")
    temperature: float | None = setting(
        None,
        "Temperature of the cosines, in place of the model's; null: the model's own, which trains.",
        within="(0, inf)",
    )
    warmup_epochs: int = setting(0, "Epochs that train by the contrastive loss first.", within="[0, inf)")


@dataclasses.dataclass
class NoisyChannelSection:
    """Weights of the noisy channel for pairs that may be mismatched."""

    smoothing: float = setting(
        0.0, "Share of the targets of the softmax loss that is uniform over the pairs of the batch.", within="[0, 1)"
    )


@dataclasses.dataclass
class DivisionSection:
    """Weights of NCR's division for pairs that may be mismatched, which have no settings."""


@dataclasses.dataclass
class ObjectiveSection:
    """The loss."""

    grad_cache_chunk_size: int | None = setting(
        None,
        "Pairs that go through the model at a time with gradient, the loss being that of the whole batch (GradCache, "
        "arXiv 2101.06983), at the price of a second forward pass; null: all at once.",
        within="[1, inf)",
        argument="grad_cache_chunk_size",
    )
    gsc: GscSection | None = setting(
        None,
        "Train with the soft labels of GSC (arXiv 2405.16996) after a warm-up: its settings, such as "
        '{"gamma": 0.01, "warmup_epochs": 2}, or {} for the defaults; null: the contrastive loss throughout.',
        argument="gsc",
    )
    rince: RinceSection | None = setting(
        None,
        "Train by the robust loss of RINCE (arXiv 2201.04309): its settings, such as "
        '{"q": 0.05, "lam": 0.1}, or {} for the defaults; null: the contrastive loss.',
        argument="rince",
    )
    symnce: SymnceSection | None = setting(
        None,
        "Train by the robust loss of SymNCE (arXiv 2501.01130): its settings, such as "
        '{"beta": 0.2}, or {} for the defaults; null: the contrastive loss.',
        argument="symnce",
    )
    noisy_channel: NoisyChannelSection | None = setting(
        None,
        "Weight each pair by the estimated probability that its caption belongs to its image: its settings, such as "
        '{"smoothing": 0.1}, or {} for the defaults; null: equal weights.',
        argument="noisy_channel",
    )
    division: DivisionSection | None = setting(
        None,
        "Weight each pair by the probability of being clean that the strategy ncr gives it, which then keeps all "
        "pairs (ratio 1): {}, since it has no settings; null: equal weights.",
        argument="division",
    )


def list_robust_objectives() -> tuple[str, ...]:
    """Return the names of the objectives that may replace the contrastive loss, of which a run has one at most."""
    types = {name: expected for name, (expected, _) in list_settings(ObjectiveSection).items()}
    return tuple(name for name, kind in types.items() if any(map(dataclasses.is_dataclass, list_members(kind))))


def find_clash(strategy: str, ratio: float, objectives: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return an objective of a run that does not go with another one or with the selection, and the problem.

    Args:
        strategy: Name of the strategy.
        ratio: Selection ratio.
        objectives: Settings of the objectives that are set, by name, see `list_robust_objectives`.
    """
    names = list(objectives)
    if len(names) > 1:
        return names[-1], f"does not go with {names[0]}: each replaces the contrastive loss; set one of them to null"
    if names == ["noisy_channel"] == [strategy]:
        return names[0], (
            "does not go with the strategy noisy_channel: both weight the pairs by the same probabilities, which "
            "would count twice; set the objective to null, or take the strategy none, which trains on all pairs"
        )
    if names == ["division"] and (strategy != "ncr" or ratio != 1):
        return names[0], (
            f"does not go with the strategy {strategy} and a ratio of {ratio:g}: its weights are the division of the "
            "strategy ncr, which divides all pairs and, with a ratio of 1, trains on all of them; take this "
            "strategy and a ratio of 1, or set the objective to null"
        )
    if names == ["gsc"] and objectives["gsc"].get("evidence") == "posterior" and strategy in _PROBABILITIES:
        return names[0], (
            f"does not go with the strategy {strategy}, as its evidence is posterior: {_PROBABILITIES[strategy]}; set "
            "evidence to probability, or take another strategy, such as none, which trains on all pairs"
        )
    return None


_PROBABILITIES = {
    "gsc": "the strategy writes the softmax probability into the same column of the ledger",
    "noisy_channel": "both weight the pairs by the same probabilities, which would count twice",
}
"""Reason why the posteriors of GSC do not go with a strategy, by its name."""
