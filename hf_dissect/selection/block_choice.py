"""Choice, from a plan alone, of the pairs of a block that are loaded: those that train and those that are scored."""

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_dissect.data.pairs import key_hash
from hf_dissect.selection.inclusion import find_inclusion, sample_systematically


def count_selected(ratio: float, num_candidates: int) -> int:
    """Return the number of pairs to keep of some candidates: at least 2, since a contrastive loss needs negatives."""
    return min(num_candidates, max(2, round(ratio * num_candidates)))


@dataclass(frozen=True)
class Loaded:
    """Pairs of a block of `B` candidates that are loaded.

    Attributes:
        rows: Positions in the block, int64 `(n,)`, ascending.
        inclusion: Probability with which each was chosen to train, float32 `(n,)`; 0 for a pair that is only scored.
        planned: Planned value of each, float32 `(n,)`; NaN for a pair that the plan does not know.
        unloaded: Sample ids `unloaded_id` int64 and planned values `unloaded_planned` float32 of the others,
            `(B - n,)` each, and `unloaded_clean` bool if their truth is known.
    """

    rows: torch.Tensor
    inclusion: torch.Tensor
    planned: torch.Tensor
    unloaded: dict[str, torch.Tensor] = field(default_factory=dict)


class LoadedRows(list[Any]):
    """Rows of a block that were loaded, before they are collated.

    Args:
        rows: Rows `(n,)` of any type.
        loaded: Which of the block they are.
    """

    def __init__(self, rows: Any, loaded: Loaded) -> None:
        super().__init__(rows)
        self.loaded = loaded


@dataclass(frozen=True)
class BlockRule:
    """Rule by which the plan decides about the pairs of a block, the same whoever asks: the sampler or a data worker.

    Args:
        ratio: Selection ratio.
        rescore_every: Number `m`; of the pairs that do not train, a share of `1 / m` is loaded to be scored.
        samples: True if the planned values are weights that pairs are drawn in proportion to; False if the pairs with
            the largest values train.
        scores: False if no pair is ever scored.
        seed: Seed of the random choices.
    """

    ratio: float
    rescore_every: int
    samples: bool
    scores: bool
    seed: int

    def choose(self, sample_id: torch.Tensor, planned: torch.Tensor, epoch: int) -> Loaded:
        """Choose the pairs of a block to load.

        A pair without a planned value takes the place of an average one, and is always loaded. The random choices
        follow from the seed, the epoch and the ids of the block.

        Args:
            sample_id: Ids of the block, int64 `(B,)`.
            planned: Planned values float32 `(B,)`, NaN for unknown pairs.
            epoch: Epoch, or pass over a stream, from 0.
        """
        content = f"{self.seed}/{epoch}/".encode() + sample_id.numpy().tobytes()
        generator = torch.Generator().manual_seed(key_hash(content))
        unknown = planned.isnan()
        size, num_selected = len(planned), count_selected(self.ratio, len(planned))
        if self.samples:
            usual = 1.0 if unknown.all() else planned[~unknown].mean().item()
            probability = find_inclusion(torch.where(unknown, usual, planned), num_selected)
            chosen = sample_systematically(probability, generator)
            # Rounding may draw a pair of probability 0 at the end of all.
            probability = probability[chosen].float().clamp_min(torch.finfo(torch.float32).tiny)
        else:
            usual = 0.0 if unknown.all() else planned[~unknown].median().item()
            order = torch.randperm(size, generator=generator)  # equal values in random order
            order = order[torch.where(unknown, usual, planned)[order].argsort(descending=True, stable=True)]
            chosen, probability = order[:num_selected].sort().values, torch.ones(num_selected)
        inclusion = torch.zeros(size).index_copy(0, chosen, probability)
        is_loaded = inclusion > 0
        if self.scores:
            is_loaded |= unknown | (torch.rand(size, generator=generator) < 1 / self.rescore_every)
        rows = is_loaded.nonzero().flatten()
        unloaded = {"unloaded_id": sample_id[~is_loaded], "unloaded_planned": planned[~is_loaded]}
        return Loaded(rows, inclusion[rows], planned[rows], unloaded)
