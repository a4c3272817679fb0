"""Names, scopes and options of the strategies, declared apart from their code so that recipes need no torch."""

from dataclasses import dataclass

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
    "none": NoOptions,
}
"""Options of each strategy, by its name."""
