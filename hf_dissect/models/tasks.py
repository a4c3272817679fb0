"""Outputs of a model that its losses are computed from, and the loss that decorrelates the tasks of a MoLA router."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dissect.mola import mola_routing


def representations(model: nn.Module, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select from the outputs of the last forward pass what the losses need, for `grad_cached_backward`.

    Returns:
        `image_embeds` and `text_embeds` `(B, D)`, and `projections`, by which a MoLA router is decorrelated:
        `(adapter, tower) -> (B, d)`, empty where there are none.
    """
    routing = mola_routing(model)
    return {
        "image_embeds": outputs["image_embeds"],
        "text_embeds": outputs["text_embeds"],
        "projections": {} if routing is None else routing.projections(),
    }


class Decorrelation:
    """Task-wise decorrelation loss of a model's MoLA router, and its mean for the logs."""

    def __init__(self) -> None:
        self._since_log: list[torch.Tensor] = []

    def add_to(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        batch: Mapping[str, Any],
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the weighted decorrelation of a batch to `loss`, which is returned unchanged without router or tasks.

        The decorrelation is gathered over the ranks, so each of them has to call this equally often.

        Args:
            loss: Loss of the batch, `()`.
            model: Model that computed it.
            batch: Batch, with `task_id` int64 `(B,)` where the pairs have tasks.
            projections: Projections of the batch (see `representations`); by default those of the last forward pass.
        """
        routing = mola_routing(model) if "task_id" in batch else None
        if routing is None or not routing.decorrelates:
            return loss
        decorrelation = routing.decorrelation_loss(batch["task_id"], projections)
        self._since_log.append(decorrelation.detach())
        return loss + decorrelation

    def state(self) -> list[float]:
        """Return the values since the last log, to continue from after a resume."""
        return [value.item() for value in self._since_log]

    def restore(self, values: list[float]) -> None:
        """Continue from what `state` returned."""
        self._since_log = [torch.tensor(value) for value in values]

    def pop_logs(self) -> dict[str, float]:
        """Return the mean over this rank's batches since the last call; nothing without batches."""
        means = {"decorrelation_loss": torch.stack(self._since_log).mean().item()} if self._since_log else {}
        self._since_log = []
        return means
