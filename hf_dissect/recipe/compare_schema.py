"""The section `compare` of a recipe: the runs that a comparison makes."""

import dataclasses

from hf_dissect.recipe.schema import STRATEGIES
from hf_dissect.settings import setting


@dataclasses.dataclass
class CompareSection:
    """The runs of `hf-dissect compare`: every strategy with every seed."""

    strategies: list[str] = setting(["none", "random", "dissect"], "Strategies, as `name` or `name:variant`.")
    seeds: list[int] = setting([0], "Seeds, each a run.", within="[0, 4294967295]")


def parse_strategy(spec: str) -> tuple[str, str | None]:
    """Return name and variant of a strategy written `name` or `name:variant`; a bare name means its first variant.

    Returns:
        Such as `("dissect", "momentum")`; the variant is None for a strategy that has none.

    Raises:
        ValueError: The name or the variant is unknown; the message lists what is allowed.
    """
    name, colon, variant = spec.partition(":")
    variants = STRATEGIES.get(name, ())
    if name not in STRATEGIES or (colon and variant not in variants):
        allowed = [*STRATEGIES, *(f"{key}:{value}" for key, values in STRATEGIES.items() for value in values)]
        raise ValueError(f"{spec!r} is not a strategy; allowed: {', '.join(allowed)}")
    return name, variant or (variants[0] if variants else None)
