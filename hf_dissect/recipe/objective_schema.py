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
class RepairSection:
    """Soft targets for captions, from the nearest pairs that are trusted; all that mismatched pairs have."""

    side: str = setting(
        "caption",
        "What is repaired; caption: the captions, by the images of near captions; both: the images as well.",
        choices=("caption", "both"),
    )
    strength: float = setting(0.5, "Weight of a repaired pair, at most that of the trusted ones.", within="(0, inf)")
    space: str = setting(
        "auto",
        "Where images are compared; learnt: the embeddings that train; average: those of a moving average of the "
        "weights, at the price of a forward pass of the images; stored: the stored features that the model reads; "
        "auto: stored where there are some, else learnt.",
        choices=("auto", "learnt", "average", "stored"),
    )
    encoder: str | None = setting(
        None, "Frozen image encoder whose output is the space, by Hub id or folder; it reads the same pixels."
    )
    memory: int = setting(2048, "Latest trusted pairs to search for near captions.", within="[64, inf)")
    neighbours: int = setting(4, "Near captions that make a target.", within="[1, 16]")
    all_pairs: bool = setting(
        True,
        "Soft targets for the captions of all pairs, beside the loss of the trusted ones; false: for doubted pairs.",
    )


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
    repair: RepairSection | None = setting(
        None,
        "Next to noisy_channel, gsc or division: captions also learn from soft targets over the images of the batch, "
        'so that mismatched pairs teach, too: its settings, such as {"side": "both"}, or {} for the defaults; null: '
        "no repair.",
        argument="repair",
    )


_ADDED = ("repair",)
"""Sections that add to an objective and replace none."""
_WITH_OPINION = ("noisy_channel", "gsc", "division")
"""Objectives that say which pairs are mismatched."""
_KEEPS_MISMATCHED = ("none", "random", "noisy_channel")
"""Strategies that keep mismatched pairs: as many as of the others, or those that repair is to mend."""


def list_robust_objectives() -> tuple[str, ...]:
    """Return the names of the objectives that may replace the contrastive loss, of which a run has one at most."""
    types = {name: expected for name, (expected, _) in list_settings(ObjectiveSection).items()}
    sections = (name for name, kind in types.items() if any(map(dataclasses.is_dataclass, list_members(kind))))
    return tuple(name for name in sections if name not in _ADDED)


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


def find_repair_fault(
    repair: Mapping[str, Any], strategy: str, rescore_every: int, objectives: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Return the problem of repair in a run; None if there is none.

    Args:
        repair: Settings of the repair.
        strategy: Name of the strategy.
        rescore_every: Its setting of that name.
        objectives: Settings of the objectives that are set, by name; see `list_robust_objectives`.
    """
    if strategy != "noisy_channel" and not objectives.keys() & set(_WITH_OPINION):
        return (
            "does not know which pairs are mismatched, which an objective has to tell it; set "
            f"{' or '.join(_WITH_OPINION)} to {{}}, take the strategy noisy_channel, or set repair to null"
        )
    if strategy == "noisy_channel" and objectives:
        return (
            f"does not go with {next(iter(objectives))} next to the strategy noisy_channel, as each has an opinion of "
            "the pairs; leave one of them out, or set repair to null"
        )
    if objectives.get("gsc", {}).get("dual"):
        return (
            "does not go with dual=true of gsc, whose two networks have two opinions of a pair; set dual to false, or "
            "repair to null"
        )
    if strategy == "noisy_channel" and rescore_every > 1:
        return (
            f"does not go with rescore_every={rescore_every}, which loads no pair that has hardly any weight; set "
            "rescore_every to 1, or repair to null"
        )
    if strategy not in _KEEPS_MISMATCHED and "division" not in objectives:  # which goes with a ratio of 1 only
        return (
            f"does not go with the strategy {strategy}, which drops pairs that repair would mend before the model "
            f"embeds them; set the strategy to {' or '.join(_KEEPS_MISMATCHED)}, or repair to null"
        )
    if repair["encoder"] is not None and repair["space"] != "auto":
        return (
            f"has an encoder, which is the space, and space {repair['space']!r}; set space to auto, or encoder to null"
        )
    return None
