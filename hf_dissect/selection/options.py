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


OPTIONS: dict[str, type] = {
    "dissect": DissectOptions,
    "random": NoOptions,
    "small_loss": NoOptions,
    "big_loss": NoOptions,
    "clipscore": NoOptions,
    "ncr": NcrOptions,
    "gsc": GscOptions,
    "noisy_channel": NoOptions,
    "none": NoOptions,
}
"""Options of each strategy, by its name."""
