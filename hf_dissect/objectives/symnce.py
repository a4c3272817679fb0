"""Objective of SymNCE: the contrastive loss, and the same loss of the other pairs taken back."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hf_dissect.losses.contrastive import RowLosses
from hf_dissect.losses.robust_rows import symnce_losses
from hf_dissect.objectives.robust_rows import RowObjective
from hf_dissect.recipe.objective_schema import SymnceSection
from hf_dissect.settings import check_values


@dataclass
class SymnceObjective(RowObjective):
    """Symmetric InfoNCE (SymNCE, arXiv 2501.01130), as we read its abstract.

    The paper adds a reverse InfoNCE to InfoNCE, so that what random labels add to the risk is the same for every
    model. Its equation was not available to us. Ours is the term with this property: `-log p+` of the true pair plus
    `beta` times the mean of `log p-` over the other pairs of its row, mean of both directions. If the partner of a
    pair is a random one of the row, the expected loss with `beta = 1` is 0 whatever the model.

    Args:
        beta, temperature, warmup_epochs: See `SymnceSection`.

    Raises:
        ValueError: A value is not allowed.
    """

    beta: float = SymnceSection.beta
    temperature: float | None = SymnceSection.temperature
    warmup_epochs: int = SymnceSection.warmup_epochs

    name: ClassVar[str] = "symnce"

    def __post_init__(self) -> None:
        check_values(SymnceSection, vars(self), "symnce: ")

    @property
    def row_losses(self) -> RowLosses:
        """Loss of rows of logits."""
        return partial(symnce_losses, beta=self.beta)
