"""Repair of mismatched pairs: their captions learn from the images of near captions that are trusted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size
from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.losses.soft_targets import soft_target_losses
from hf_dissect.objectives.image_space import ImageSpace
from hf_dissect.objectives.pair_memory import PairMemory
from hf_dissect.recipe.objective_schema import RepairSection
from hf_dissect.selection.opinion import Opinion
from hf_dissect.settings import check_values

TRUSTED = 0.7
"""Probability of being matched above which a pair enters the memory."""
SMALLEST_DOUBT = 0.05
"""Probability of being mismatched below which a pair is not repaired."""
FEWEST_PAIRS = 4
"""Pairs in the memory, in units of the neighbours of a caption, from which repair begins."""
SPREAD = 3.5
"""Standard deviation of the logarithm of a target over the images of the batch."""
CAPTION_SHARPNESS = 4.0
"""Factor from the cosines between captions to the logarithm of a target, in units of the model's own scale."""
BEGIN, FULL = 1 / 8, 5 / 8
"""Shares of the run at which repair begins, and from which it has its whole strength."""


@dataclass
class Repair:
    """Loss with a soft target for each caption, also of pairs that are mismatched.

    A mismatched pair still has a good caption. Trusted pairs whose captions are near to it tell what its image looks
    like: the sum `r` of their image vectors, weighted by their trust. The target of caption `t_i` is the softmax of
    `r . R_j` over the images `R_j` of the batch, scaled so that each target has the same spread, and the loss is

        d_i * -sum_j target_ij log softmax_j(s t_i . v_j)

    with the model's scale `s` without gradient. `d_i` is 1, or the probability of being mismatched without
    `all_pairs`. The trusted pairs are the latest of the run, see `PairMemory`. Image vectors are centred on the mean
    of the memory. Entries that share the image of a pair or are the pair itself do not count: they would confirm it.

    The sum over the batch counts at most as much as that of the trusted pairs, `strength * min(1, sum w / sum d)`, and
    rises from 0 at an eighth of the run to all of it at five eighths, because the first opinions are poor.

    That clean neighbours can take the place of a partner is the finding of IN2R (ICML 2026, arXiv 2606.04061), which
    trains a network for it. The target over the batch, centring, spread, ramp and balance are our own.

    Args:
        side, strength, memory, neighbours, all_pairs: See `RepairSection`.
        space: Space of the image vectors.

    Raises:
        ValueError: A value is not allowed.
    """

    side: str = RepairSection.side
    strength: float = RepairSection.strength
    memory: int = RepairSection.memory
    neighbours: int = RepairSection.neighbours
    all_pairs: bool = RepairSection.all_pairs
    space: ImageSpace = field(default_factory=ImageSpace)

    def __post_init__(self) -> None:
        check_values(RepairSection, {name: value for name, value in vars(self).items() if name != "space"}, "repair: ")
        self.pairs = PairMemory(self.memory)
        self._ramp = 0.0
        self._begins_step = True
        self._shares: list[torch.Tensor] = []

    def begin_step(self, progress: float) -> None:
        """Begin an optimiser step.

        Args:
            progress: Share of the run that is done, in [0, 1].
        """
        self._ramp, self._begins_step = min(max((progress - BEGIN) / (FULL - BEGIN), 0.0), 1.0), True

    @property
    def strength_now(self) -> float:
        """Strength in the current step, before the balance with the trusted pairs; 0 while there is no memory."""
        return self.strength * self._ramp * (self.pairs.count >= FEWEST_PAIRS * self.neighbours)

    def compute_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        opinion: Opinion,
    ) -> torch.Tensor:
        """Compute the loss of the own pairs among those of all ranks, and add the trusted ones to the memory.

        Args:
            model: Model that trains, wrapped or not.
            batch: Batch of `b` pairs, with `sample_id` and, if it is known, `image_key`, int64 `(b,)`.
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)` of unit length.
            scale: Factor of the similarities in the logits, `()`.
            opinion: What the objective believes of the pairs.

        Returns:
            Loss `()` with gradient, the mean over the `b` pairs.
        """
        images, texts = (promote_to_float32(outputs[f"{side}_embeds"]) for side in ("image", "text"))
        with torch.autocast(texts.device.type, enabled=False):
            own = self._gather(texts, self.space.embed(model, batch, outputs, self._begins_step), opinion, batch)
            self._begins_step = False
            loss = 0 * texts.sum()
            if self.strength_now:
                trusted, doubted = own.weights.sum(), own.doubt.sum()
                strength = self.strength_now * (trusted / doubted.clamp_min(1e-6)).clamp_max(1)
                losses = self._compute_losses(texts, images, scale.detach(), own)
                loss = strength * (own.doubt[own.rows] * losses).mean()
                self._shares.append(strength * doubted / (strength * doubted + trusted).clamp_min(1e-6))
        self.pairs.add(own.captions, own.images, own.matched, own.keys, own.matched > TRUSTED)
        return loss

    def _gather(
        self, texts: torch.Tensor, vectors: torch.Tensor, opinion: Opinion, batch: Mapping[str, Any]
    ) -> "_Pairs":
        """Gather what repair needs of the pairs of all ranks."""
        factors = batch.get("pair_weight") if opinion.factors is None else opinion.factors
        factors = torch.ones_like(opinion.matched) if factors is None else factors.to(opinion.matched)
        columns = [
            texts.detach(),
            vectors.to(texts),
            *(values.to(texts)[:, None] for values in (opinion.matched, opinion.weights * factors, factors)),
        ]
        numbers = gather_last_dimension(torch.cat(columns, dim=1).T).T
        captions, images, rest = numbers.split([texts.shape[1], vectors.shape[1], 3], dim=1)
        matched, weights, factors = rest.T
        sample_id = batch["sample_id"].to(texts.device)
        image_key = batch.get("image_key", -2 - sample_id).to(texts.device)  # a key that no pair of the memory has
        keys = gather_last_dimension(torch.stack([sample_id, image_key]))
        doubt = torch.ones_like(matched) if self.all_pairs else 1 - matched
        doubt = torch.where(doubt < SMALLEST_DOUBT, 0, doubt) * factors
        first = get_rank_and_world_size()[0] * len(texts)
        return _Pairs(captions, images, matched, weights, doubt, keys, slice(first, first + len(texts)))

    def _compute_losses(
        self,
        texts: torch.Tensor,
        images: torch.Tensor,
        scale: torch.Tensor,
        pairs: "_Pairs",
    ) -> torch.Tensor:
        """Compute the losses of the own pairs `(b,)`, of the captions or the mean of both sides."""
        vectors, first = self.pairs.center(pairs.images), pairs.rows.start
        own_keys = pairs.keys[:, pairs.rows]

        def find_image_targets(block: slice) -> torch.Tensor:
            return self.find_image_targets(texts[block].detach(), own_keys[:, block], vectors)

        def find_caption_targets(block: slice) -> torch.Tensor:
            rows = slice(first + block.start, first + block.stop)
            found = self.pairs.find_captions(vectors[rows], own_keys[:, block], self.neighbours)
            return (CAPTION_SHARPNESS * scale * found @ pairs.captions.T).log_softmax(1)

        losses = soft_target_losses(texts, gather_with_grad(images), scale, find_image_targets)
        if self.side == "caption":
            return losses
        return (losses + soft_target_losses(images, gather_with_grad(texts), scale, find_caption_targets)) / 2

    def find_image_targets(self, captions: torch.Tensor, keys: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Find the targets of captions over some images.

        Args:
            captions: Embeddings of the captions, of unit length, `(r, D)`.
            keys: Id of each caption's pair and key of its image, int64 `(2, r)`.
            images: Vectors of the images, centred by `PairMemory.center`, `(N, F)`.

        Returns:
            Logarithms of the targets `(r, N)`; all `-inf` for a caption without neighbours.
        """
        logits = self.pairs.find_images(captions, keys, self.neighbours) @ images.T
        spread = logits.std(1, keepdim=True)
        return torch.where(spread > 1e-6, (SPREAD * logits / spread).log_softmax(1), -torch.inf)

    def pop_logs(self) -> dict[str, float]:
        """Return the share of repaired pairs in the weight of the loss since the last call, for the logs."""
        shares, self._shares = self._shares, []
        return {"selection_repaired_share": torch.stack(shares).mean().item()} if shares else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and what the space learns."""
        return {"pairs": self.pairs.state_dict(), "space": self.space.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.pairs.load_state_dict(state["pairs"])
        if state["space"]:
            self.space.load_state_dict(state["space"])


@dataclass(frozen=True)
class _Pairs:
    """The pairs of all ranks, `N` rows, of which `rows` are this rank's own."""

    captions: torch.Tensor
    images: torch.Tensor
    matched: torch.Tensor
    weights: torch.Tensor
    doubt: torch.Tensor
    keys: torch.Tensor
    rows: slice
