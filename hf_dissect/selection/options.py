"""Names, scopes and options of the strategies, declared apart from their code so that recipes need no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_dissect.settings import setting

SCOPES = ("local", "global")
"""Candidates that a process chooses among when several processes train: its own, or those of all processes."""


@dataclass
class NoOptions:
    """Keywords of a strategy without options."""


@dataclass
class DissectOptions:
    """Keywords of `Dissect` that a recipe may set; further settings of the run determine the others."""

    variant: str = setting(
        "warmup",
        "Source of the history; warmup: the score of the last warm-up epoch, frozen; momentum: a moving average of "
        "the scores at each visit, starting at the first one.",
        choices=("warmup", "momentum"),
    )
    momentum: float = setting(0.9, "Share of the old value in the moving average of momentum.", within="[0, 1)")
    warmup_on: str = setting(
        "subset",
        "Pairs that train during warm-up, a random subset of the selection ratio or all candidates.",
        choices=("subset", "all"),
    )
    history: str = setting(
        "ledger",
        "Past that a score is compared with; ledger: the pair's own earlier score (variant); average, snapshot: the "
        "score by a moving average or a snapshot of the model, which serves data seen once and takes a second scoring "
        "forward pass.",
        choices=("ledger", "average", "snapshot"),
    )
    average_momentum: float = setting(
        0.999, "With history: average, share of the old weights in the average at each step.", within="[0, 1)"
    )
    model_warmup_steps: int = setting(
        1000,
        "With history: average or snapshot, steps that train random subsets first; then the average is used, or the "
        "snapshot taken.",
        within="[1, inf)",
    )
    snapshot_every: int | None = setting(
        None,
        "With history: snapshot, steps after which the current weights replace it; null: never.",
        within="[2, inf)",
    )


_OF_HISTORY = {
    "average_momentum": ("average",),
    "model_warmup_steps": ("average", "snapshot"),
    "snapshot_every": ("snapshot",),
}
"""Values of `history` with which an option of `DissectOptions` has an effect."""


def find_unused_option(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the name and the problem of an option of dissect that has no effect next to the others; None without one.

    Args:
        options: Options by name; those left out have their defaults.
    """
    history = options.get("history", DissectOptions.history)
    for name, histories in _OF_HISTORY.items():
        default = getattr(DissectOptions, name)
        if options.get(name, default) != default and history not in histories:
            needed = " or ".join(histories)
            problem = f"has no effect with history: {history}; leave it out, or set history to {needed}"
            return name, f"{options[name]!r} {problem}"
    if history != "ledger" and options.get("variant") == "momentum":
        return "variant", f"'momentum' averages scores in the ledger, and history: {history} reads none; leave it out"
    return None


@dataclass
class GscOptions:
    """Keywords of `Gsc`."""

    beta: float = setting(0.7, "Weight of the new value in the labels' moving averages.", within="(0, 1]")
    temperature: float = setting(0.07, "Temperature of the cross-modal similarities.", within="(0, inf)")
    seed: int = setting(0, "Seed of the mixture's start.", within="[0, 4294967295]")


@dataclass
class NcrOptions:
    """Keywords of `Ncr` that a recipe may set; further settings of the run determine the others."""

    seed: int = setting(0, "Seed of the mixture's start.", within="[0, 4294967295]")


@dataclass
class JestOptions:
    """Keywords of `Jest`."""

    chunks: int = setting(16, "Blocks in which the kept pairs are drawn one after another.", within="[1, inf)")


@dataclass
class CoresetOptions:
    """Keywords of `Coreset`."""

    score: str = setting(
        "clipscore",
        "Score of the pairs by the reference; clipscore: cosine of image and caption; clip_loss: contrastive loss, "
        "the smallest first.",
        choices=("clipscore", "clip_loss"),
    )


WITH_REFERENCE = ("learnability", "rho", "jest", "coreset")
"""Strategies that need a reference model."""


@dataclass
class InfoBatchOptions:
    """Keywords of `InfoBatch` that a recipe may set; the length of the run determines the others."""

    prune_probability: float = setting(
        0.5,
        "Probability r by which a pair with a loss below the mean is less likely to train than the others; those that "
        "train weigh 1 / (1 - r) times as much.",
        within="[0, 1)",
    )
    annealing: float = setting(
        0.875, "Share of the steps of the run after which all candidates train.", within="(0, 1]"
    )


@dataclass
class ScanOptions:
    """Keywords of `Scan` that a recipe may set; further settings of the run determine the others."""

    cycle: int = setting(3, "Epochs that prune after each epoch that marks the pairs to prune.", within="[1, inf)")
    ill_matched: float = setting(
        0.5,
        "Share of the marked pairs that have the largest losses of their batch; the others have the smallest.",
        within="[0, 1]",
    )


@dataclass
class ForgettingOptions:
    """Keywords of `Forgetting`."""

    never_learnt: str = setting(
        "first",
        "Place of the pairs that were never learnt; first: before the most often forgotten, as in the paper; last: "
        "after those that were never forgotten, where captions may be wrong.",
        choices=("first", "last"),
    )


USAGE = {
    "dissect": "choice",
    "random": "choice",
    "small_loss": "choice",
    "big_loss": "choice",
    "clipscore": "choice",
    "ncr": "choice",
    "gsc": "choice",
    "info_batch": "draw",
    "scan": "choice",
    "forgetting": "choice",
    "noisy_channel": "draw",
    "learnability": "choice",
    "rho": "choice",
    "jest": "draw",
}
"""Strategies that take a penalty of usage. "choice": `choose_pairs` repeats the choice by the priorities of the
strategy, or at random if it has none; "draw": the strategy draws pairs and reads the penalty itself."""


def find_usage_problem(strategy: str, ratio: float, rescore_every: int) -> str | None:
    """Return the reason why a penalty of usage does not go with a selection; None if it does.

    Args:
        strategy: Name of the strategy.
        ratio: Selection ratio.
        rescore_every: Setting of this name.
    """
    if strategy not in USAGE:
        reason = {
            "none": "keeps all pairs",
            "coreset": "trains on all pairs of its coreset",
            "divbs": "chooses a subset whose directions stand for the batch, and ranks no pair by itself",
        }
        return (
            f"does not go with the strategy {strategy}, which "
            f"{reason.get(strategy, 'does not say how it takes one')}; set it to 0, or take one of {', '.join(USAGE)}"
        )
    if ratio == 1:
        return "would change nothing: a ratio of 1 keeps all pairs; set it to 0, or lower the ratio"
    if USAGE[strategy] == "draw" and rescore_every > 1:
        return (
            f"does not go with rescore_every {rescore_every} and the strategy {strategy}, whose plan gives the "
            "weights of the losses, too; set one of them to 0 or 1"
        )
    return None


OPTIONS: dict[str, type] = {
    "dissect": DissectOptions,
    "random": NoOptions,
    "small_loss": NoOptions,
    "big_loss": NoOptions,
    "clipscore": NoOptions,
    "ncr": NcrOptions,
    "gsc": GscOptions,
    "info_batch": InfoBatchOptions,
    "scan": ScanOptions,
    "divbs": NoOptions,
    "forgetting": ForgettingOptions,
    "noisy_channel": NoOptions,
    "learnability": NoOptions,
    "rho": NoOptions,
    "jest": JestOptions,
    "coreset": CoresetOptions,
    "none": NoOptions,
}
"""Options of each strategy, by its name."""
