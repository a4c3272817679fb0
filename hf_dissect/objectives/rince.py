"""Objective of RINCE: a contrastive loss whose gradient does not grow with how wrong a pair is."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hf_dissect.losses.contrastive import RowLosses
from hf_dissect.losses.robust_rows import rince_losses
from hf_dissect.objectives.robust_rows import RowObjective
from hf_dissect.recipe.objective_schema import RinceSection
from hf_dissect.settings import check_values


@dataclass
class RinceObjective(RowObjective):
    """Robust InfoNCE (RINCE, CVPR 2022, arXiv 2201.04309).

    The loss of a pair in one direction is `-exp(q s+) / q + (lam * sum(exp(s))) ** q / q` with the logit `s+` of the
    pair and the logits `s` of its row, that of the pair among them; both directions are averaged. `q` close to 0 gives
    the gradient of the contrastive loss, `q = 1` a loss that is symmetric, and so robust, in the true partner.

    Unlike the softmax loss, it changes if all similarities grow alike: a pair with the probability `p` of its
    partner pulls all of them up by `p ** q - lam ** q`. One encoder of two views, as in the paper, cannot give way
    to that; two towers can, and may end with all pairs in one point if `q` is not small. A fixed temperature keeps
    the scale of the logits from following.

    Args:
        q, lam, temperature, warmup_epochs: See `RinceSection`.

    Raises:
        ValueError: A value is not allowed.
    """

    q: float = RinceSection.q
    lam: float = RinceSection.lam
    temperature: float | None = RinceSection.temperature
    warmup_epochs: int = RinceSection.warmup_epochs

    name: ClassVar[str] = "rince"

    def __post_init__(self) -> None:
        check_values(RinceSection, vars(self), "rince: ")

    @property
    def row_losses(self) -> RowLosses:
        """Loss of rows of logits."""
        return partial(rince_losses, q=self.q, lam=self.lam)
