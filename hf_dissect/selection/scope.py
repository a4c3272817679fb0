"""Among which candidates a strategy chooses when several processes train: each among its own, or all among all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_dissect.distributed import Ranks
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores, losses_of_rows
from hf_dissect.selection.strategy import SelectionStrategy


@dataclass(frozen=True)
class Kept:
    """Which of its readable candidates a rank keeps.

    Attributes:
        indices: int64 `(c,)`, positions among the rank's `n` readable candidates, ascending.
        weights: float32 `(c,)` of the per-pair losses, or None for equal weights.
        priority: float32 `(n,)`, the value the rule ranked by; None when it ranked by nothing.
        counts: how many each rank keeps.
        measured: what the strategy measured of the `n` candidates, `(n,)` each, under the same names on every rank.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None
    priority: torch.Tensor | None
    counts: list[int]
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)


def select_among_own(
    strategy: SelectionStrategy,
    candidates: CandidateScores,
    ledger: SampleLedger,
    sizes: list[int],
    num_selected: Callable[[int], int],
) -> Kept:
    """Each rank keeps `k` of its own candidates, by the number of the rank that has the fewest.

    Args:
        strategy, ledger: of the run.
        candidates: the `n` readable ones of this rank.
        sizes: `n` of each rank.
        num_selected: tells `k` for a number of candidates.
    """
    fewest = min(sizes)
    if not fewest:
        return _nothing(sizes)
    selection = strategy.select(candidates, ledger, num_selected(fewest))
    # Equal numbers on all ranks, also where all candidates train.
    kept = slice(fewest)
    weights = None if selection.weights is None else selection.weights[kept]
    indices = selection.indices[kept]
    measured = strategy.measure(candidates, ledger) if _are_scored(candidates) else {}
    return Kept(indices, weights, selection.priority, [len(indices)] * len(sizes), measured)


def select_among_all(
    strategy: SelectionStrategy,
    candidates: CandidateScores,
    ledger: SampleLedger,
    sizes: list[int],
    num_selected: Callable[[int], int],
    ranks: Ranks,
) -> Kept:
    """All ranks keep the same `k` of the union of their candidates; see `select_among_own` for the arguments.

    Every rank makes the same choice, which is that of one process with the candidates of all, in the order of the
    ranks. A rest that cannot be shared out equally is left: at most one pair fewer than there are ranks.
    """
    share = num_selected(sum(sizes)) // len(sizes)
    if not share:
        return _nothing(sizes)
    everyone = GatheredScores(candidates, sizes, ranks)
    selection = strategy.select(everyone, ledger, share * len(sizes))
    equal = slice(len(selection.indices) // len(sizes) * len(sizes))
    indices = selection.indices[equal]
    ends = torch.tensor(sizes).cumsum(0)
    places = torch.searchsorted(indices, torch.cat([torch.zeros(1, dtype=torch.int64), ends])).tolist()
    own, end = slice(places[ranks.own], places[ranks.own + 1]), int(ends[ranks.own])
    brought = slice(end - sizes[ranks.own], end)
    measured = strategy.measure(everyone, ledger) if _are_scored(candidates) else {}
    return Kept(
        indices[own] - brought.start,
        None if selection.weights is None else selection.weights[equal][own],
        None if selection.priority is None else selection.priority[brought],
        [end - begin for begin, end in zip(places, places[1:], strict=False)],
        {name: values[brought] for name, values in measured.items()},
    )


def told_to_all(
    candidates: CandidateScores, kept: Kept, is_clean: torch.Tensor | None, sizes: list[int], ranks: Ranks
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What every rank is to know of the candidates of all, `(sum of sizes,)` each, in one exchange.

    Returns:
        `sample_id`, `kept`, `priority` (NaN where the rule ranked by nothing), and where they are known `correlation`
        and `is_clean`; and what the strategy measured.
    """
    size = candidates.num_candidates
    columns = {
        "sample_id": candidates.sample_id,
        "kept": torch.zeros(size, dtype=torch.bool).index_fill(0, kept.indices, True),
        "priority": torch.full((size,), torch.nan) if kept.priority is None else kept.priority.float(),
    }
    if _are_scored(candidates):
        columns["correlation"] = candidates.correlation
    if is_clean is not None:
        columns["is_clean"] = is_clean
    measured = {f"measured.{name}": values for name, values in kept.measured.items()}
    told = ranks.gather_columns(columns | measured, sizes)
    return {name: told[name] for name in columns}, {name: told[f"measured.{name}"] for name in kept.measured}


def _are_scored(candidates: CandidateScores) -> bool:
    return candidates.image_embeds is not None


def _nothing(sizes: list[int]) -> Kept:
    return Kept(torch.zeros(0, dtype=torch.int64), None, None, [0] * len(sizes))


class GatheredScores(CandidateScores):
    """Scores of the candidates of all ranks, in the order of the ranks; each part is exchanged when it is asked for.

    Strategies do the same on all ranks, so all ranks ask for the same parts.
    """

    def __init__(self, own: CandidateScores, sizes: list[int], ranks: Ranks):
        self._own, self._sizes, self._ranks = own, sizes, ranks
        self.logit_scale, self.logit_bias, self.kind = own.logit_scale, own.logit_bias, own.kind
        columns = {"sample_id": own.sample_id}
        if own.image_embeds is not None:
            columns["correlation"] = own.correlation
        columns = ranks.gather_columns(columns, sizes)
        self.sample_id = columns["sample_id"]
        if own.image_embeds is not None:
            self.__dict__["correlation"] = columns["correlation"]

    @cached_property
    def image_embeds(self) -> torch.Tensor | None:
        embeds = self._own.image_embeds
        return None if embeds is None else self._ranks.gather_rows(embeds, self._sizes)

    @cached_property
    def text_embeds(self) -> torch.Tensor | None:
        embeds = self._own.text_embeds
        return None if embeds is None else self._ranks.gather_rows(embeds, self._sizes)

    @cached_property
    def loss(self) -> torch.Tensor:
        """Contrastive loss of each pair among the candidates of all ranks; each rank computes that of its own."""
        own = losses_of_rows(
            self._own.image_embeds,
            self._own.text_embeds,
            self.image_embeds,
            self.text_embeds,
            offset=sum(self._sizes[: self._ranks.own]),
            scale=self.logit_scale,
            bias=self.logit_bias,
            kind=self.kind,
        )
        return self._ranks.gather_columns({"loss": own}, self._sizes)["loss"]


def share_out(
    batch: Mapping[str, torch.Tensor], counts: list[int], ranks: Ranks, padding: Mapping[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    """Move kept pairs from ranks that have too many to those that have too few, until all have the same number.

    Args:
        batch: the kept pairs of this rank: tensors `(c, ...)`.
        counts: `c` of each rank; their sum divides by their number.
        padding: of keys whose second dimension may differ between ranks (captions padded to the longest of a batch):
            the value to pad with, and the side, "left" or "right"; 0 on the right where a key is not told.

    Returns:
        The batch with the same number of pairs on each rank; what came from others stands behind the own.
    """
    if len(set(counts)) == 1:
        return dict(batch)
    to_ranks, from_ranks = planned_moves(counts, ranks.own)
    batch = _equally_long(batch, ranks, padding)
    stay = counts[ranks.own] - sum(to_ranks)
    return {
        name: torch.cat([value[:stay], ranks.send_rows(value[stay:], to_ranks, from_ranks)])
        for name, value in batch.items()
    }


def planned_moves(counts: list[int], rank: int) -> tuple[list[int], list[int]]:
    """Pairs that a rank sends to each other rank and gets from each, until all have the mean: as few as possible.

    Surplus and lack are laid side by side in the order of the ranks; where two of them overlap, pairs move.
    """
    above = torch.tensor(counts) - sum(counts) // len(counts)
    surplus, lack = above.clamp_min(0), (-above).clamp_min(0)
    surplus_end, lack_end = surplus.cumsum(0), lack.cumsum(0)

    def overlaps(end: torch.Tensor, size: torch.Tensor, ends: torch.Tensor, sizes: torch.Tensor) -> list[int]:
        return (torch.minimum(end, ends) - torch.maximum(end - size, ends - sizes)).clamp_min(0).tolist()

    to_ranks = overlaps(surplus_end[rank], surplus[rank], lack_end, lack)
    return to_ranks, overlaps(lack_end[rank], lack[rank], surplus_end, surplus)


def _equally_long(
    batch: Mapping[str, torch.Tensor], ranks: Ranks, padding: Mapping[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    names = [name for name, value in batch.items() if value.dim() == 2]
    longest = ranks.table(*(batch[name].shape[1] for name in names)).amax(0).tolist() if names else []
    padded = dict(batch)
    for name, length in zip(names, longest, strict=True):
        value, side = padding.get(name, (0, "right"))
        lacking = length - batch[name].shape[1]
        padded[name] = torch.nn.functional.pad(
            batch[name], (lacking, 0) if side == "left" else (0, lacking), value=value
        )
    return padded
