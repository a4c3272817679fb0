"""A copy of the model's weights from earlier steps, whose scores stand for the past of pairs that are seen once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_WRAPPERS = ("module.", "_orig_mod.")
_SPLIT = ("ds_id", "_is_flat_param")
"""Attributes by which DeepSpeed and FSDP mark a weight that is split over the processes."""


class PastModel:
    """Moving average or snapshot of the weights that train, and of the statistics of batch norm.

    Frozen weights are not copied, so the copy of an adapter is as small as the adapter. To score with the copy, it
    takes the place of the weights for one forward pass; no second model is built, and nothing is moved.

    Args:
        kind: `"average"` or `"snapshot"`.
        momentum: Share of the old value in the average at each step, in [0, 1).
        warmup_steps: Steps before the copy is used, at least 1. The average starts with the weights of the first step,
            the snapshot is taken after these steps.
        every: Steps after which the snapshot is replaced by the current weights; None to keep the first one.
        setting: Setting that asks for the copy, and what to set it to where there can be none, for the error.
    """

    def __init__(
        self,
        kind: str,
        momentum: float,
        warmup_steps: int,
        every: int | None = None,
        setting: tuple[str, str] = ("selection.options.history", "ledger"),
    ) -> None:
        self.kind = kind
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.every = every
        self._setting = setting
        self._steps = 0
        self._taken = 0  # step in which the copy was made
        self._copy: dict[str, torch.Tensor] = {}

    @property
    def is_ready(self) -> bool:
        """True if the copy differs from the current weights and can be used."""
        return bool(self._copy) and self._steps > max(self.warmup_steps, self._taken + 1)

    def update(self, model: nn.Module) -> None:
        """Begin an optimiser step: average the weights, or take a snapshot if one is due; every rank calls this.

        Args:
            model: Model that trains, wrapped or not.

        Raises:
            ValueError: The weights are split over several processes (FSDP, DeepSpeed).
        """
        weights = self._list_weights(model)
        if self.kind == "average":
            self._average(weights)
        elif self._steps == self.warmup_steps or (
            self.every and self._steps > self.warmup_steps and (self._steps - self.warmup_steps) % self.every == 0
        ):
            self._take(weights)
        self._steps += 1

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Put the copy in the place of the model's weights inside the block.

        Args:
            model: Model that trains, wrapped or not.
        """
        weights = self._list_weights(model)
        self._copy = {name: self._copy[name].to(weight) for name, weight in weights.items()}
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the copy and its age."""
        return {"steps": self._steps, "taken": self._taken, "copy": dict(self._copy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved copy."""
        self._steps, self._taken = state["steps"], state["taken"]
        self._copy = {name: weight.clone() for name, weight in state["copy"].items()}

    def _average(self, weights: Mapping[str, torch.Tensor]) -> None:
        if not self._copy:
            self._take(weights)
            return
        for name, weight in weights.items():
            self._copy[name] = self._copy[name].to(weight).lerp_(weight.detach(), 1 - self.momentum)

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._copy = {name: weight.detach().clone() for name, weight in weights.items()}
        self._taken = self._steps

    def _list_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights that train and the floating-point buffers, by their names without wrappers."""
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        weights = {_strip_wrappers(name): weight for name, weight in [*trained, *buffers]}
        if any(isinstance(part, DTensor) or any(hasattr(part, mark) for mark in _SPLIT) for part in weights.values()):
            setting, other = self._setting
            raise ValueError(
                f"{setting}: a copy of the model needs whole weights on every process, and these are split "
                f"(FSDP, DeepSpeed); set it to {other}, or train with DDP."
            )
        return weights

    def _exchange(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            weight.data, self._copy[name] = self._copy[name], weight.data


def _strip_wrappers(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
