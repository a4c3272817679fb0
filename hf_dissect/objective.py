"""Objective of a run: the contrastive loss or a robust one, plus repair of mismatched pairs and a decorrelation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.models.families import check_outputs
from hf_dissect.models.tasks import Decorrelation
from hf_dissect.models.twin_encoder import split_embeddings
from hf_dissect.objectives.repair import Repair
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.selection import SampleLedger, SelectionStrategy
from hf_dissect.selection.opinion import Opinion


class Objective:
    """Loss of a run over the kept pairs of all ranks.

    Args:
        kind: Contrastive loss of the model, "softmax" or "sigmoid".
        mask_false_negatives: True to leave pairs that share an image or a caption out of each other's negatives.
        robust: Objective that replaces the contrastive loss after its warm-up; None for the contrastive loss
            throughout.
        num_networks: Number of networks of the model, 2 for a `TwinDualEncoder`, whose losses are added.
        repair: Soft targets for the pairs that the robust objective believes mismatched; None without them.

    Attributes:
        columns: Ledger columns of the objective.

    Raises:
        ValueError: The robust objective does not fit the loss of the model or its number of networks.
    """

    def __init__(
        self,
        kind: str,
        mask_false_negatives: bool = False,
        robust: RobustObjective | None = None,
        num_networks: int = 1,
        repair: Repair | None = None,
    ) -> None:
        if robust is not None:
            _check_fit(robust, kind, num_networks)
        self.contrastive_loss = ContrastiveLoss(kind, mask_false_negatives)
        self.num_networks = num_networks
        self.decorrelation = Decorrelation()
        self.robust = robust
        self.repair = repair
        self.columns: tuple[str, ...] = () if robust is None else robust.columns
        self._epoch = 0
        self._strategy: SelectionStrategy | None = None

    def on_epoch_begin(self, epoch: int) -> None:
        """Set the epoch, counted from 0, when it begins or is resumed."""
        self._epoch = epoch

    def begin_step(self, progress: float = 1.0, strategy: SelectionStrategy | None = None) -> None:
        """Begin an optimiser step, of one micro-batch or more, before its pairs are selected.

        Args:
            progress: Share of the run that is done, in [0, 1].
            strategy: Strategy of the run, which draws pairs for the repair as well, and may have an opinion for it.
        """
        if self.robust is not None:
            self.robust.begin_step()
        if self.repair is not None:
            self.repair.begin_step(progress)
            self._strategy = strategy
            if strategy is not None:
                strategy.repair_strength = self.repair.strength_now

    def compute_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        ledger: SampleLedger,
        projections: Mapping[tuple[str, str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the loss of a batch of `b` pairs, the same number on every rank.

        In training, the task-wise decorrelation loss of a MoLA router is added if the pairs have tasks.

        Args:
            model: Model that computed the outputs.
            batch: Batch, with the weights of the pairs as `pair_weight` float32 `(b,)` if the strategy weights them,
                and as a function `reweigh` (`hf_dissect.losses.contrastive.Weigh`) if they follow from the losses.
            outputs: Outputs of the model, see `ContrastiveLoss`.
            scale: Factor of the similarities in the logits, with gradient, `()`; for two networks `(2,)`.
            bias: Summand of the logits, with gradient, `()`; for two networks `(2,)`.
            ledger: Ledger with the soft labels, if there are any.
            projections: Projections that a router is decorrelated by; None for those of the last forward pass.

        Returns:
            Loss `()` with gradient.
        """
        check_outputs(outputs)
        if self.robust is None or self._epoch < self.robust.warmup_epochs:
            loss = self._compute_contrastive_loss(batch, outputs, scale, bias)
        else:
            loss = self.robust.compute_loss(self.contrastive_loss, batch, outputs, scale, bias, ledger)
        if self.repair is not None and model.training and (opinion := self._find_opinion(batch, ledger)) is not None:
            loss = loss + self.repair.compute_loss(model, batch, outputs, scale, opinion)
        return self.decorrelation.add_to(loss, model, batch, projections) if model.training else loss

    def _find_opinion(self, batch: Mapping[str, Any], ledger: SampleLedger) -> Opinion | None:
        if self.robust is not None:
            return self.robust.opinion
        return None if self._strategy is None else self._strategy.read_opinion(ledger, batch)

    def _compute_contrastive_loss(
        self,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        weights = batch.get("reweigh", batch.get("pair_weight"))
        keys = {name: batch.get(name) for name in ("image_key", "caption_key")}
        if self.num_networks == 1:
            return self.contrastive_loss(outputs, scale=scale, bias=bias, weights=weights, **keys)
        images, texts = (
            split_embeddings(outputs[name], self.num_networks) for name in ("image_embeds", "text_embeds")
        )
        losses = [
            self.contrastive_loss(
                {"image_embeds": own_images, "text_embeds": own_texts},
                scale=own_scale,
                bias=own_bias,
                weights=weights,
                **keys,
            )
            for own_images, own_texts, own_scale, own_bias in zip(images, texts, scale, bias, strict=True)
        ]
        return sum(losses[1:], losses[0])

    def compute_evidence(
        self, outputs: Mapping[str, torch.Tensor], sample_id: torch.Tensor, ledger: SampleLedger
    ) -> dict[str, torch.Tensor]:
        """Return the evidence about the own `b` pairs of a training step, `(b,)` each; empty without any."""
        return {} if self.robust is None else self.robust.compute_evidence(outputs, sample_id, ledger)

    @property
    def reads_ledger(self) -> bool:
        """True if the loss of a step needs values of its pairs from the ledger."""
        return self.repair is not None or self.robust is not None and self.robust.reads_ledger

    def update(self, ledger: SampleLedger) -> None:
        """Update values once an epoch, as `SelectionStrategy.update` does for a strategy."""
        if self.robust is not None:
            self.robust.update(ledger)

    def pop_logs(self) -> dict[str, float]:
        """Return figures since the last call: those of the decorrelation, the robust objective and the repair."""
        parts = (self.decorrelation, self.robust, self.repair)
        return {name: value for part in parts if part is not None for name, value in part.pop_logs().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of robust objective and repair that is not in the ledger."""
        state = {} if self.robust is None else self.robust.state_dict()
        return state if self.repair is None else {**state, "repair": self.repair.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if self.repair is not None and state.get("repair"):
            self.repair.load_state_dict(state["repair"])
        own = {name: value for name, value in state.items() if name != "repair"}
        if self.robust is not None and own:
            self.robust.load_state_dict(own)


def _check_fit(robust: RobustObjective, kind: str, num_networks: int) -> None:
    name = robust.name
    if kind not in robust.kinds:
        raise ValueError(
            f"{name}: its loss is made of {' or '.join(robust.kinds)} probabilities, and the model trains with the "
            f"{kind} loss; use a model of the {' or '.join(robust.kinds)} loss, such as CLIP, or leave {name} "
            f"(objective.{name} in a recipe) out."
        )
    if robust.num_networks > num_networks:
        raise ValueError(
            f"{name}: dual=true trains two networks, and the model is one; join two by "
            "hf_dissect.TwinDualEncoder.of(first, second)."
        )
    if robust.num_networks < num_networks:
        way_out = "which dual=true trains; set it, or give" if name == "gsc" else f"and {name} trains one; give"
        raise ValueError(f"{name}: the model consists of two networks, {way_out} one of them.")
