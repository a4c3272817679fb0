"""Objectives that replace the cross-entropy of the contrastive loss by another loss of the same logits."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.contrastive import RowLosses
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.selection import SampleLedger


class RowObjective(RobustObjective):
    """Mean over pairs and both directions of a loss of the rows of logits, with the negatives of all ranks.

    It is gathered, masked, computed in blocks and weighted as the contrastive loss is. It keeps no state.
    """

    takes_mask: ClassVar[bool] = True
    temperature: float | None = None

    @property
    def row_losses(self) -> RowLosses:
        """Loss of rows of logits."""
        raise NotImplementedError

    def compute_loss(
        self,
        contrastive_loss: ContrastiveLoss,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the mean of the weighted losses; see `RobustObjective`."""
        loss = ContrastiveLoss(
            "softmax", contrastive_loss.mask_false_negatives, contrastive_loss.max_logits, self.row_losses
        )
        keys = {name: batch.get(name) for name in ("image_key", "caption_key")}
        weights = batch.get("pair_weight")
        if self.temperature is None:
            return loss(outputs, scale=scale, bias=bias, weights=weights, **keys)
        embeds = {name: outputs[name] for name in ("image_embeds", "text_embeds")}
        fixed = torch.full_like(scale, 1 / self.temperature)
        # DDP waits for a gradient of every parameter, so scale and bias get one of zero.
        return loss(embeds, scale=fixed, weights=weights, **keys) + 0 * (scale + bias).sum()
