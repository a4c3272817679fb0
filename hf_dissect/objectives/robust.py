"""The contract of an objective that is robust against mismatched pairs."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.opinion import Opinion


class RobustObjective:
    """Base class of the objectives that replace the contrastive loss.

    A new objective is one file with one subclass, a section of settings in `hf_dissect.recipe.objective_schema`, and a
    line in `DissectTrainingArguments.make_objective`.

    Attributes:
        name: Name of the objective in recipes and arguments.
        kinds: Losses of the models that it works for, of "softmax" and "sigmoid".
        columns: Ledger columns of the objective.
        warmup_epochs: Number of epochs that train with the contrastive loss first.
        warmup: What the steps of the warm-up do, for a warning.
        after_warmup: What the epochs after the warm-up have, for an error.
        num_networks: Number of networks that it trains, 2 for a `TwinDualEncoder`.
        opinion: Opinion about the own pairs whose loss was computed last; None of an objective without any, and during
            its warm-up.
        reads_ledger: True if the loss needs values of the pairs from the ledger.
        takes_mask: True if pairs that share an image or a caption can be left out of each other's negatives.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("softmax",)
    columns: tuple[str, ...] = ()
    warmup_epochs: int = 0
    warmup: ClassVar[str] = "train by the contrastive loss"
    after_warmup: ClassVar[str] = "its loss"
    num_networks: int = 1
    opinion: Opinion | None = None
    takes_mask: ClassVar[bool] = False
    reads_ledger: ClassVar[bool] = False

    def compute_loss(
        self,
        contrastive_loss: ContrastiveLoss,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
    ) -> torch.Tensor:
        """Compute the loss of the own pairs among those of all ranks.

        Args:
            contrastive_loss: Contrastive loss of the run, which knows the kind of the model and the mask.
            batch: Batch of `b` pairs, with their ids as `sample_id` int64 `(b,)`, and with the weights of the strategy
                as `pair_weight` float32 `(b,)` if it weights them.
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            scale: Factor of the similarities in the logits, with gradient, `()`.
            bias: Summand of the logits, with gradient, `()`.
            ledger: Ledger of the run.

        Returns:
            Loss `()` with gradient.
        """
        raise NotImplementedError

    def compute_evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Return the evidence about the own pairs of a training step, to exchange between the ranks.

        It is called once after each loss in training, also during the warm-up.

        Args:
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            sample_id: Ids of the pairs, int64 `(b,)`.
            ledger: Ledger of the run.

        Returns:
            Evidence by name, float32 `(b,)` each.
        """
        return {}

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write the evidence about pairs that this rank holds, `(n,)` each, to the ledger; each pair stands alone."""

    def summarize(self, evidence: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return sums over the own pairs, float64 `(m,)`, as many on every rank; None for none."""
        return None

    def observe(self, sums: torch.Tensor) -> None:
        """Receive the sums `(m,)` over the pairs of all ranks, the same on every rank, before the next step."""

    def update(self, ledger: SampleLedger) -> None:
        """Update values for a whole epoch from the second epoch on, such as labels."""

    def begin_step(self) -> None:
        """Begin an optimiser step, of one micro-batch or more."""

    def pop_logs(self) -> dict[str, float]:
        """Return figures since the last call, for the logs of training."""
        return {}

    def compute_figures(self) -> dict[str, float]:
        """Return figures of the objective for `metrics.json`, such as an estimated share of mismatched pairs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is not in the ledger, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
