"""Floating-point operations of the steps of a run, without counting the weights of the model in every step."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class StepOperations:
    """Function from the inputs of a step to its floating-point operations, as `Trainer.floating_point_ops`.

    The Trainer multiplies the numbers of the model's main input by a factor that follows from its weights, and walks
    through all modules and weights for it in every step. Here, the factor is computed in the first step.

    Args:
        count: Method of the Trainer.
        model: Model that trains; its number of weights must stay the same.
    """

    def __init__(self, count: Callable[[Any], int], model: nn.Module) -> None:
        self._count = count
        self._main_input: str = getattr(model, "main_input_name", "input_ids")
        self._factor: int | None = None

    def __call__(self, inputs: Mapping[str, Any]) -> int:
        """Return the floating-point operations of a step; 0 where the Trainer does not know them."""
        numbers = inputs[self._main_input].numel() if self._main_input in inputs else 0
        if not numbers:
            return 0
        if self._factor is None:
            self._factor = self._count(inputs) // numbers
        return numbers * self._factor
