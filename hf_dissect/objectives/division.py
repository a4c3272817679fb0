"""Objective of NCR's division: pairs are weighted by the probability of being clean that divides their losses."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_dissect.distributed import gather_last_dimension
from hf_dissect.losses import ContrastiveLoss
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.opinion import Opinion


class DivisionObjective(RobustObjective):
    """Contrastive loss weighted by the division of the strategy `ncr`, "Learning with Noisy Correspondence" (2021).

    Where the strategy keeps the pairs that are most probably clean, this objective trains on all pairs, each with the
    probability in the ledger column `p_clean` as its weight. It needs the strategy with a ratio of 1, which scores and
    divides all pairs once an epoch. Weights of data and strategy multiply with its own.

    A pair without a probability takes the median of those in the batch of all ranks, as in the strategy. A batch
    without any probability trains by the contrastive loss, and there is no opinion about it.

    Args:
        warmup_epochs: Number of epochs of the strategy's warm-up, in which a division has no effect yet.
    """

    name: ClassVar[str] = "division"
    kinds: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")
    takes_mask: ClassVar[bool] = True
    reads_ledger: ClassVar[bool] = True
    after_warmup: ClassVar[str] = "the weights of the division"

    def __init__(self, warmup_epochs: int = 1) -> None:
        self.warmup_epochs = warmup_epochs

    def begin_step(self) -> None:
        """Forget the opinion about the pairs of the last step."""
        self.opinion = None

    def compute_loss(
        self,
        contrastive_loss: ContrastiveLoss,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the weighted contrastive loss, times the weights of the strategy; see `RobustObjective`.

        Raises:
            ValueError: The ledger has no column `p_clean`, since the strategy is another one.
        """
        own = self._read_probabilities(batch["sample_id"], ledger, outputs["image_embeds"].device)
        self.opinion = None if own is None else Opinion(own, own)
        weights = batch.get("pair_weight")
        if own is not None:
            weights = own if weights is None else own * weights.to(own)
        keys = {name: batch.get(name) for name in ("image_key", "caption_key")}
        return contrastive_loss(outputs, scale=scale, bias=bias, weights=weights, **keys)

    def _read_probabilities(
        self, sample_id: torch.Tensor, ledger: SampleLedger, device: torch.device
    ) -> torch.Tensor | None:
        """Return the probability of each own pair, float32 `(b,)`; None if no pair of all ranks has one."""
        if "p_clean" not in ledger.columns:
            raise ValueError(
                "division: the ledger has no column p_clean, which the strategy ncr writes; train with the strategy "
                "ncr (selection_strategy, selection.strategy in a recipe), or without division."
            )
        own = ledger.read("p_clean", sample_id).to(device)
        everywhere = gather_last_dimension(own[None])[0]
        known = everywhere[~everywhere.isnan()]
        return torch.where(own.isnan(), known.median(), own) if len(known) else None
