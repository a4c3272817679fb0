"""Outputs of a model that its losses need, and the loss that decorrelates the tasks of a MoLA router."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dissect.mola import mola_routing


def select_representations(model: nn.Module, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the outputs of the last forward pass that the losses need, for `grad_cached_backward`.

    Args:
        model: Model, wrapped or not, that has just made a forward pass.
        outputs: Outputs of that pass, with `image_embeds` and `text_embeds` `(B, D)`.

    Returns:
        `image_embeds`, `text_embeds`, and `projections`: a mapping from `(adapter, tower)` to the projections `(B, d)`
        that a MoLA router is decorrelated by, empty without a router.
    """
    routing = mola_routing(model)
    return {
        "image_embeds": outputs["image_embeds"],
        "text_embeds": outputs["text_embeds"],
        "projections": {} if routing is None else routing.projections(),
    }


class Decorrelation:
    """Task-wise decorrelation loss of a MoLA router, and its mean for the logs."""

    def __init__(self) -> None:
        self._since_log: list[torch.Tensor] = []

    def add_to(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        batch: Mapping[str, Any],
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the weighted decorrelation of a batch to its loss.

        The decorrelation is gathered over the ranks, so all of them must call this method equally often.

        Args:
            loss: Loss of the batch, `()`.
            model: Model that computed the loss.
            batch: Batch, with `task_id` int64 `(B,)` if the pairs have tasks.
            projections: Projections of the batch, see `select_representations`; None for those of the last forward
                pass.

        Returns:
            The sum `()`; the loss itself without a router or without tasks.
        """
        routing = mola_routing(model) if "task_id" in batch else None
        if routing is None or not routing.decorrelates:
            return loss
        decorrelation = routing.decorrelation_loss(batch["task_id"], projections)
        self._since_log.append(decorrelation.detach())
        return loss + decorrelation

    def state_dict(self) -> dict[str, list[float]]:
        """Return the losses since the last log."""
        return {"since_log": [value.item() for value in self._since_log]}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from a saved state."""
        self._since_log = [torch.tensor(value) for value in state["since_log"]]

    def pop_logs(self) -> dict[str, float]:
        """Return the mean over the batches of this rank since the last call; empty without batches."""
        means = {"decorrelation_loss": torch.stack(self._since_log).mean().item()} if self._since_log else {}
        self._since_log = []
        return means
