"""Scope of a selection by several processes: each rank chooses among its own candidates, or all ranks among all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_dissect.data.pair_keys import GIVEN_WEIGHT
from hf_dissect.data.pair_weights import multiply_weights
from hf_dissect.distributed import Ranks
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores, compute_row_losses
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.usage import choose_pairs


@dataclass(frozen=True)
class Kept:
    """Choice of a rank among its `n` readable candidates.

    Attributes:
        indices: Positions of the `c` kept candidates, int64 `(c,)`, ascending.
        weights: Weights of their losses, float32 `(c,)`; None for equal weights.
        priority: Values that the strategy ranked by, float32 `(n,)`; None for a strategy without a ranking.
        counts: Number of kept candidates of each rank.
        measured: Further measurements of the strategy, `(n,)` each, under the same names on every rank.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None
    priority: torch.Tensor | None
    counts: list[int]
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)


def select_from_own(
    strategy: SelectionStrategy,
    candidates: CandidateScores,
    ledger: SampleLedger,
    sizes: list[int],
    num_selected: Callable[[int], int],
) -> Kept:
    """Select among the candidates of this rank, as many on every rank.

    Args:
        strategy: Strategy of the run.
        candidates: Scores of the `n` readable candidates of this rank.
        ledger: Ledger of the run.
        sizes: Number `n` of each rank; the smallest one decides how many every rank keeps.
        num_selected: Function from a number of candidates to the number of pairs to keep.

    Returns:
        Choice of this rank.
    """
    fewest = min(sizes)
    if not fewest:
        return _keep_nothing(sizes)
    selection = choose_pairs(strategy, candidates, ledger, num_selected(fewest))
    # A strategy that keeps all candidates returns as many as its rank has.
    kept = slice(fewest)
    weights = None if selection.weights is None else selection.weights[kept]
    indices = selection.indices[kept]
    measured = strategy.measure(candidates, ledger) if _are_scored(candidates) else {}
    return Kept(indices, weights, selection.priority, [len(indices)] * len(sizes), measured)


def select_from_all(
    strategy: SelectionStrategy,
    candidates: CandidateScores,
    ledger: SampleLedger,
    sizes: list[int],
    num_selected: Callable[[int], int],
    ranks: Ranks,
) -> Kept:
    """Select among the candidates of all ranks, as one process would select from their union.

    All ranks make the same choice. The number of kept pairs is rounded down to a multiple of the number of ranks.

    Args:
        strategy: Strategy of the run.
        candidates: Scores of the `n` readable candidates of this rank.
        ledger: Ledger of the run.
        sizes: Number `n` of each rank.
        num_selected: Function from a number of candidates to the number of pairs to keep.
        ranks: Processes of the run.

    Returns:
        Choice of this rank, its part of the common choice; the ranks may keep different numbers.
    """
    share = num_selected(sum(sizes)) // len(sizes)
    if not share:
        return _keep_nothing(sizes)
    everyone = GatheredScores(candidates, sizes, ranks)
    selection = choose_pairs(strategy, everyone, ledger, share * len(sizes))
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


def describe_selection(
    candidates: CandidateScores, kept: Kept, is_clean: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the choice of this rank with the scores of its candidates, for the trace.

    Args:
        candidates: Scores of the `n` readable candidates of this rank.
        kept: Choice of this rank.
        is_clean: Truth of the candidates, bool `(n,)`; None if it is unknown.

    Returns:
        Columns `(n,)`: `sample_id`, `kept`, `priority` (NaN for a strategy without a ranking) and, if they are known,
        `correlation` and `is_clean`.
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
    return columns


def _are_scored(candidates: CandidateScores) -> bool:
    return candidates.image_embeds is not None


def _keep_nothing(sizes: list[int]) -> Kept:
    return Kept(torch.zeros(0, dtype=torch.int64), None, None, [0] * len(sizes))


class GatheredScores(CandidateScores):
    """Scores of the candidates of all ranks, in the order of the ranks.

    Embeddings and losses are exchanged when they are first read. A strategy does the same on all ranks, so all of them
    take part in the exchange.

    Args:
        own: Scores of the candidates of this rank.
        sizes: Number of candidates of each rank.
        ranks: Processes of the run.
    """

    def __init__(self, own: CandidateScores, sizes: list[int], ranks: Ranks) -> None:
        self._own, self._sizes, self._ranks = own, sizes, ranks
        self.logit_scale, self.logit_bias, self.kind = own.logit_scale, own.logit_bias, own.kind
        columns = {"sample_id": own.sample_id}
        if own.image_embeds is not None:
            columns["correlation"] = own.correlation
        if own.past_correlation is not None:
            columns["past_correlation"] = own.past_correlation
        columns = ranks.gather_columns(columns, sizes)
        self.sample_id = columns["sample_id"]
        self.past_correlation = columns.get("past_correlation")
        self.reference = None if own.reference is None else GatheredScores(own.reference, sizes, ranks)
        if own.image_embeds is not None:
            self.__dict__["correlation"] = columns["correlation"]

    @cached_property
    def image_embeds(self) -> torch.Tensor | None:  # type: ignore[override]  # a plain attribute of the base class
        """Embeddings of the images, float32 `(sum(sizes), D)` of unit length; None without scores."""
        embeds = self._own.image_embeds
        return None if embeds is None else self._ranks.gather_rows(embeds, self._sizes)

    @cached_property
    def text_embeds(self) -> torch.Tensor | None:  # type: ignore[override]  # a plain attribute of the base class
        """Embeddings of the captions, float32 `(sum(sizes), D)` of unit length; None without scores."""
        embeds = self._own.text_embeds
        return None if embeds is None else self._ranks.gather_rows(embeds, self._sizes)

    def _compute_losses(self, kind: str, temperature: float = 1.0) -> torch.Tensor:
        """Compute the losses among the candidates of all ranks, float32 `(sum(sizes),)` on the CPU."""
        own = compute_row_losses(
            *self._own.get_embeds(),
            *self.get_embeds(),
            offset=sum(self._sizes[: self._ranks.own]),
            scale=self.logit_scale * temperature,
            bias=self.logit_bias,
            kind=kind,
        )
        return self._ranks.gather_columns({"loss": own}, self._sizes)["loss"]


def keep_rows(
    batch: Mapping[str, torch.Tensor],
    good: torch.Tensor,
    kept: Kept,
    ranks: Ranks,
    padding: Mapping[str, tuple[int, str]],
) -> dict[str, torch.Tensor]:
    """Return the rows of a batch that were kept, the same number on each rank, with their weights.

    Args:
        batch: Candidates of this rank, `(B, ...)`.
        good: Positions of the readable candidates, int64 `(n,)`.
        kept: Choice of this rank among these.
        ranks: Processes of the run.
        padding: Padding of captions, see `rebalance`.

    Returns:
        Kept rows, with `pair_weight` if the strategy or the data weight them.
    """
    device = batch["sample_id"].device
    if len(kept.indices) == len(batch["sample_id"]) and kept.weights is None:
        kept_batch = dict(batch)
    else:
        rows = good[kept.indices].to(device)
        kept_batch = {name: value[rows] for name, value in batch.items()}
    weights = multiply_weights(kept.weights, kept_batch.pop(GIVEN_WEIGHT, None), device)
    if weights is not None:
        kept_batch["pair_weight"] = weights
    return rebalance(kept_batch, kept.counts, ranks, padding)


def rebalance(
    batch: Mapping[str, torch.Tensor], counts: list[int], ranks: Ranks, padding: Mapping[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    """Move kept pairs between ranks until all ranks have the same number.

    Args:
        batch: Kept pairs of this rank, tensors `(c, ...)`.
        counts: Number `c` of each rank; their sum is a multiple of the number of ranks.
        ranks: Processes of the run.
        padding: Value and side ("left" or "right") of the padding by key, for tensors whose second dimension may
            differ between ranks, such as captions padded to the longest of a batch; 0 on the right for other keys.

    Returns:
        The batch, with the same number of pairs on each rank; pairs from other ranks come last.
    """
    if len(set(counts)) == 1:
        return dict(batch)
    to_ranks, from_ranks = plan_moves(counts, ranks.own)
    batch = _pad_to_longest(batch, ranks, padding)
    stay = counts[ranks.own] - sum(to_ranks)
    return {
        name: torch.cat([value[:stay], ranks.send_rows(value[stay:], to_ranks, from_ranks)])
        for name, value in batch.items()
    }


def plan_moves(counts: list[int], rank: int) -> tuple[list[int], list[int]]:
    """Plan the fewest moves of pairs between ranks that leave the same number on all of them.

    Surplus and lack are laid side by side in the order of the ranks. Where a surplus overlaps a lack, pairs move.

    Args:
        counts: Number of pairs of each rank; their sum is a multiple of the number of ranks.
        rank: Rank to plan for.

    Returns:
        Numbers of pairs that it sends to each rank, and that it receives from each rank.
    """
    above = torch.tensor(counts) - sum(counts) // len(counts)
    surplus, lack = above.clamp_min(0), (-above).clamp_min(0)
    surplus_end, lack_end = surplus.cumsum(0), lack.cumsum(0)

    def overlaps(end: torch.Tensor, size: torch.Tensor, ends: torch.Tensor, sizes: torch.Tensor) -> list[int]:
        return (torch.minimum(end, ends) - torch.maximum(end - size, ends - sizes)).clamp_min(0).tolist()

    to_ranks = overlaps(surplus_end[rank], surplus[rank], lack_end, lack)
    return to_ranks, overlaps(lack_end[rank], lack[rank], surplus_end, surplus)


def _pad_to_longest(
    batch: Mapping[str, torch.Tensor], ranks: Ranks, padding: Mapping[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    names = [name for name, value in batch.items() if value.dim() == 2]
    longest = ranks.gather_numbers(*(batch[name].shape[1] for name in names)).amax(0).tolist() if names else []
    padded = dict(batch)
    for name, length in zip(names, longest, strict=True):
        value, side = padding.get(name, (0, "right"))
        lacking = length - batch[name].shape[1]
        padded[name] = torch.nn.functional.pad(
            batch[name], (lacking, 0) if side == "left" else (0, lacking), value=value
        )
    return padded
