"""Loss since the last log, which the Trainer forgets on resuming."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class LossSum(Protocol):
    """Attributes of `transformers.Trainer` that hold the sum of losses and its log."""

    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int


class LossSinceLog:
    """Sum of this rank's losses since the last log, and the step of that log, as state of a run.

    Args:
        trainer: Trainer that sums the losses. It sets the sum to zero when training begins, after the checkpoint was
            read: a loaded state waits until `apply`.
    """

    def __init__(self, trainer: LossSum):
        self._trainer = trainer
        self._waiting: tuple[float, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the step."""
        return {"loss": float(self._trainer._tr_loss), "step": self._trainer._globalstep_last_logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved state for `apply`."""
        self._waiting = state["loss"], state["step"]

    def apply(self) -> None:
        """Give the trainer the loaded state, if there is one."""
        if self._waiting is None:
            return
        loss, self._trainer._globalstep_last_logged = self._waiting
        self._trainer._tr_loss += loss
        self._trainer._total_loss_scalar -= loss  # the mean of this call is that of its own steps
        self._waiting = None
