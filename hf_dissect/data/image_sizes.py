"""Sizes of the training pictures over a run: small ones are decoded and encoded faster."""

import json
import math
from collections.abc import Mapping
from typing import Any

ROUNDING = 1e-9


class ImageSizes:
    """Schedule of the side of the training pictures.

    Args:
        given: Side in pixels for the whole run, or sides by the share of the training steps from which each holds, as
            in `{0.0: 112, 0.8: 224}`; text is read as JSON.

    Attributes:
        stages: Share and side of each stage, the first at 0.

    Raises:
        ValueError: It is neither; the message says why.
    """

    def __init__(self, given: Any) -> None:
        self.stages = _read_stages(given)

    @property
    def constant(self) -> int | None:
        """Side of a run of one size; None if it changes."""
        return self.stages[0][1] if len(self.stages) == 1 else None

    @property
    def sides(self) -> list[int]:
        """Sides of all stages, in their order."""
        return [side for _, side in self.stages]

    def find(self, step: int, max_steps: int) -> int:
        """Return the side of the pictures of an optimiser step.

        Args:
            step: Number of the step, from 0.
            max_steps: Number of steps of the run.
        """
        begun = [side for share, side in self.stages if math.ceil(share * max_steps - ROUNDING) <= step]
        return begun[-1]

    def as_setting(self) -> int | dict[str, int]:
        """Return the schedule as JSON has it."""
        return self.constant or {f"{share:g}": side for share, side in self.stages}


def find_size_fault(given: Any) -> str | None:
    """Return what is wrong with a schedule; None when nothing is."""
    try:
        _read_stages(given)
    except ValueError as error:
        return str(error)
    return None


def _read_stages(given: Any) -> list[tuple[float, int]]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            pass
    if _is_side(given):
        return [(0.0, given)]
    wanted = "allowed: a side in pixels such as 112, or sides by share of the steps such as {0.0: 112, 0.8: 224}"
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{given!r} is not allowed; {wanted}")
    stages = []
    for key, side in given.items():
        try:
            share = math.nan if isinstance(key, bool) else float(key)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 <= share < 1 or not _is_side(side):
            fault = f"{key!r}: {side!r} is not allowed; the share is in [0, 1) and the side an integer"
            raise ValueError(f"{fault}; {wanted}")
        stages.append((share, side))
    stages.sort()
    shares = [share for share, _ in stages]
    if shares[0] != 0 or len(set(shares)) < len(shares):
        raise ValueError(f"{given!r} is not allowed: the first share is 0, and each is there once; {wanted}")
    if len(stages) > 1 and any(one == other for (_, one), (_, other) in zip(stages, stages[1:], strict=False)):
        raise ValueError(f"{given!r} is not allowed: two stages that follow each other have the same side; {wanted}")
    return stages


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
