"""Loss since the last log, which the Trainer does not save."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class LossSum(Protocol):
    """Attributes of `transformers.Trainer` that hold the sum of losses and its log."""

    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int


class LossSinceLog:
    """Sum of the losses of this rank since the last log, and the step of that log.

    The Trainer sets the sum to zero when training begins, after the checkpoint was read. A loaded state therefore
    waits for `apply`.

    Args:
        trainer: Trainer that adds the losses.
    """

    def __init__(self, trainer: LossSum) -> None:
        self._trainer = trainer
        self._waiting: tuple[float, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the step."""
        return {"loss": float(self._trainer._tr_loss), "step": self._trainer._globalstep_last_logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved state for `apply`."""
        self._waiting = state["loss"], state["step"]

    def apply(self) -> None:
        """Add the loaded state to that of the trainer, if there is one."""
        if self._waiting is None:
            return
        loss, self._trainer._globalstep_last_logged = self._waiting
        self._trainer._tr_loss += loss
        self._trainer._total_loss_scalar -= loss  # so that the mean of this training counts its own steps only
        self._waiting = None
