"""Blocks of which a plan has loaded a part: some pairs train, some are scored, and the others keep their past."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hf_dissect.data.pair_keys import GIVEN_WEIGHT
from hf_dissect.data.pair_weights import multiply_weights
from hf_dissect.distributed import scale_to_mean_one
from hf_dissect.losses.contrastive import Weigh
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_access import LedgerAccess
from hf_dissect.selection.ledger_plan import LedgerPlan
from hf_dissect.selection.loaded_scores import LoadedScores
from hf_dissect.selection.loop_hooks import Batch
from hf_dissect.selection.scope import Kept
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.selection.usage import count_visits, read_visits

Rescore = Callable[[Batch, int], CandidateScores]
"""Function that scores rows: batch `(n, ...)` and the number of rows in a forward pass."""

_UNLOADED = ("unloaded_id", "unloaded_planned", "unloaded_clean")


@dataclass
class LoadedBlock:
    """A block between the loading of its pairs and the end of its training step.

    Attributes:
        inclusion: Probability with which each of the `n` loaded pairs was chosen to train, `(n,)`; 0 for the others.
        planned: Planned value of each, `(n,)`.
        unloaded: Ids, planned values and truths of the `u` pairs that were not loaded, `(u,)` each, by name.
        epoch: Epoch of the selection.
        step: Optimiser step of the selection.
        rows: Positions of the pairs that train `(k,)`, then of those that are held back `(h,)`, among the loaded.
        num_trained: Number `k` of pairs that train.
        held: Rows that are held back, `(h, ...)` each, on the device of the model.
        spare: First loaded row, `(1, ...)`, for a forward pass that only the other ranks need.
        sample_id: Ids of the pairs in `rows`, int64 `(k + h,)`.
        is_clean: Truth of these pairs, bool `(k + h,)`; None if it is unknown.
        embeds: Embeddings of the images and captions that trained, `(k, D)` each; None before.
    """

    inclusion: torch.Tensor
    planned: torch.Tensor
    unloaded: Batch
    epoch: int = 0
    step: int = 0
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    num_trained: int = 0
    held: Batch = field(default_factory=dict)
    spare: Batch = field(default_factory=dict)
    sample_id: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    is_clean: torch.Tensor | None = None
    embeds: tuple[torch.Tensor, torch.Tensor] | None = None


class LoadedBlocks:
    """Keeper of the blocks of a step, from the selection of their pairs to the record of their scores.

    Args:
        plan: Plan of the run; None if all candidates are loaded, and there are no such blocks.
        strategy: Strategy of the run.
        access: Access of the steps to the ledger of the run.
        trace: Trace of the selections.
    """

    def __init__(
        self,
        plan: LedgerPlan | None,
        strategy: SelectionStrategy,
        access: LedgerAccess,
        trace: SelectionTrace,
    ) -> None:
        self.plan = plan
        self.strategy = strategy
        self.access, self.ledger, self.ranks = access, access.ledger, access.ranks
        self.trace = trace
        self._waiting: deque[LoadedBlock | None] = deque()

    def begin_epoch(self, epoch: int) -> None:
        """Begin or continue an epoch of the plan."""
        if self.plan is not None:
            self.plan.begin_epoch(epoch, self.ledger)

    def reset(self) -> None:
        """Forget the plan, and the blocks of a run that ended in the middle of a step."""
        self._waiting.clear()
        if self.plan is not None:
            self.plan.reset()

    def pass_over(self, sizes: list[int]) -> None:
        """Leave out a batch that was loaded as a whole, and trains unless a rank has none of its `sizes`."""
        if self.plan is not None and min(sizes):
            self._waiting.append(None)

    def add_evidence(self, kept: Kept, candidates: CandidateScores, sizes: list[int]) -> Kept:
        """Add the evidence of scored candidates to what the strategy measured, if a plan reads it.

        Args:
            kept: Choice of this rank.
            candidates: Scores of its candidates.
            sizes: Number of candidates of each rank.
        """
        if self.plan is None or "evidence" not in self.ledger.columns or not min(sizes):
            return kept
        if candidates.image_embeds is None:
            return kept
        return replace(kept, measured={"evidence": candidates.evidence, **kept.measured})

    def note_whole(self, columns: dict[str, torch.Tensor]) -> None:
        """Mark candidates that were all loaded as such."""
        if self.plan is not None:
            loaded = torch.ones_like(columns["kept"])
            columns |= {"loaded": loaded, "scored": loaded & ("correlation" in columns)}

    def keep(self, batch: Batch, block: LoadedBlock, good: torch.Tensor, counts: list[int]) -> Batch:
        """Return the rows that train, the same number on every rank, and hold the others back.

        Args:
            batch: Loaded rows `(n, ...)` on the device of the model.
            block: Block of these rows.
            good: Positions of the readable rows, int64 `(g,)`.
            counts: Number of readable rows of each rank that were chosen to train.

        Returns:
            Rows that train, none if a rank has none, with `pair_weight` `(k,)` if the data or the strategy weight
            pairs: the planned weights over the inclusion probabilities. If the strategy weights them by the losses
            of the step, too, `reweigh` is the function from losses to weights.
        """
        is_chosen = block.inclusion[good] > 0
        train, others = good[is_chosen], good[~is_chosen]
        # Where a rank could not read some of its rows, the other ranks score their surplus instead of training on it.
        train, surplus = train[: min(counts)], train[min(counts) :]
        held = torch.cat([others, surplus]).sort().values
        block.rows, block.num_trained = torch.cat([train, held]), len(train)
        block.sample_id = batch["sample_id"].cpu()[block.rows]
        block.is_clean = batch["is_clean"].cpu()[block.rows] if "is_clean" in batch else None
        device = batch["sample_id"].device
        block.held = {name: value[held.to(device)] for name, value in batch.items()}
        block.spare = {name: value[:1] for name, value in batch.items()}
        if min(counts):  # otherwise there is no training step that could end
            self._waiting.append(block)
        kept = {name: value[train.to(device)] for name, value in batch.items()}
        given, weights = kept.pop(GIVEN_WEIGHT, None), None
        if self.strategy.samples:
            planned, inclusion = block.planned[train], block.inclusion[train]
            weights = scale_to_mean_one(_fill_by_mean(planned) / inclusion)
            weigh = self.strategy.reweigh(planned.to(device), inclusion.to(device))
            if weigh is not None:
                # The one entry that is not a tensor.
                kept["reweigh"] = weigh if given is None else partial(_weigh_both, weigh, given)  # type: ignore[assignment]
        if (product := multiply_weights(weights, given, device)) is not None:
            kept["pair_weight"] = product
        return kept

    def add_outputs(self, outputs: Mapping[str, torch.Tensor]) -> bool:
        """Take in the outputs of the training forward of the batch whose turn it is, embeddings `(k, D)`.

        Returns:
            False for a batch that was not loaded by a plan.
        """
        if not self._waiting or self._waiting[0] is None:
            return False
        images, texts = (
            F.normalize(outputs[name].detach().float(), dim=-1) for name in ("image_embeds", "text_embeds")
        )
        self._waiting[0].embeds = images, texts
        return True

    def finish(self, model: nn.Module, kind: str, rescore: Rescore | None, chunk_size: int | None) -> None:
        """Score the rows of the first batch that were held back, and record its block; every rank calls this method.

        Args:
            model: Model with the weights of the training step.
            kind: Loss of the model.
            rescore: Function that scores rows; None if no pair is scored in this epoch.
            chunk_size: Largest number of rows in a forward pass; None for any.
        """
        block = self._waiting.popleft() if self._waiting else None
        if block is None:
            return
        if block.embeds is None:
            raise ValueError("finish_step came before record_training; call both for each batch, in this order.")
        self.access.fetch(block.sample_id)
        numbers = self.ranks.gather_numbers(len(block.held["sample_id"]), len(block.unloaded["unloaded_id"]))
        most = int(numbers[:, 0].max())
        held = _score_held(block, rescore, most, chunk_size) if rescore is not None and most else None
        candidates = LoadedScores(block.sample_id, block.embeds, held, logit_scale_and_bias(model), kind)
        trained = torch.tensor([block.num_trained, 0])  # as many on every rank
        self._record(block, candidates, rescore is not None, (numbers + trained).T.tolist())

    def _record(self, block: LoadedBlock, candidates: LoadedScores, scores: bool, sizes: list[list[int]]) -> None:
        """Write the new values to the ledger, and the block to the trace.

        Args:
            block: Block of this rank.
            candidates: Scores of its loaded pairs.
            scores: True if pairs are scored in this epoch.
            sizes: Number of loaded pairs of each rank, and of those that were not loaded.
        """
        unloaded, loaded = len(block.unloaded["unloaded_id"]), len(block.sample_id)
        trained = torch.arange(loaded + unloaded) < block.num_trained
        columns = {
            "sample_id": torch.cat([block.sample_id, block.unloaded["unloaded_id"]]),
            "kept": trained,
            "loaded": torch.arange(loaded + unloaded) < loaded,
            "priority": torch.cat([block.planned[block.rows], block.unloaded["unloaded_planned"]]),
        }
        if block.is_clean is not None and (not unloaded or "unloaded_clean" in block.unloaded):
            left = block.unloaded.get("unloaded_clean", torch.zeros(0, dtype=torch.bool))
            columns["is_clean"] = torch.cat([block.is_clean, left])
        measured = self.strategy.measure(candidates, self.ledger) if scores else {}
        if "evidence" in self.ledger.columns and scores:
            measured = {"evidence": candidates.evidence, **measured}
        new = {"sample_id": block.sample_id, "correlation": candidates.correlation, **measured}
        new = {name: _fill_up(values, loaded) for name, values in new.items()}
        self.access.record(new, sizes[0], self.write)
        self.access.fetch(columns["sample_id"])
        sums = self.strategy.summarize_block(columns["sample_id"], self.ledger)
        if sums is not None:
            self.strategy.observe(self.ranks.add_up(sums))
        columns["correlation"] = self.ledger.read("correlation", columns["sample_id"])
        is_new = torch.arange(loaded + unloaded) < candidates.num_candidates
        columns["scored"] = is_new & ~trained
        everyone = [own + others for own, others in zip(*sizes, strict=True)]
        columns |= read_visits(self.strategy, self.ledger, columns["sample_id"])
        self.trace.observe(block.epoch, block.step, columns, everyone, self.ranks)
        if self.strategy.usage_penalty:
            trained_id = {"sample_id": block.sample_id[: block.num_trained]}
            self.access.record(trained_id, [block.num_trained] * self.ranks.count, count_visits)

    def write(self, sample_id: torch.Tensor, columns: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write scores of pairs to a ledger that holds them, and let the strategy record them.

        Args:
            sample_id: Ids of the pairs, int64 `(n,)`.
            columns: `correlation`, NaN for pairs that were not scored, and what the strategy measured, `(n,)` each.
            ledger: Ledger of these pairs.
        """
        is_new = ~columns["correlation"].isnan()
        if not is_new.all():
            sample_id = sample_id[is_new]
            columns = {name: values[is_new] for name, values in columns.items()}
        measured = {name: values for name, values in columns.items() if name != "correlation"}
        ledger.write("correlation", sample_id, columns["correlation"])
        if self.plan is not None and "evidence" in measured and "evidence" in ledger.columns:
            known = ~measured["evidence"].isnan()
            ledger.write("evidence", sample_id[known], measured["evidence"][known])
        self.strategy.record(sample_id, columns["correlation"], ledger, measured)


def take_block(batch: Mapping[str, torch.Tensor]) -> tuple[Batch, LoadedBlock | None]:
    """Separate what a `BlockCollator` added to a batch; None as the block if all candidates were loaded.

    Returns:
        Batch of the rows alone, and the block.
    """
    if "unloaded_id" not in batch:
        return dict(batch), None
    rest = {name: value for name, value in batch.items() if name not in (*_UNLOADED, "inclusion", "planned")}
    unloaded = {name: batch[name].cpu() for name in _UNLOADED if name in batch}
    return rest, LoadedBlock(batch["inclusion"].cpu(), batch["planned"].cpu(), unloaded)


def _fill_up(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return values of the first pairs `(n,)` with NaN for the others up to `count`; ids of all stay as they are."""
    if len(values) == count:
        return values
    return torch.cat([values.float(), torch.full((count - len(values),), torch.nan)])


def _weigh_both(weigh: Weigh, given: torch.Tensor, losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return weigh(losses, counts) * given


def _fill_by_mean(values: torch.Tensor) -> torch.Tensor:
    unknown = values.isnan()
    return torch.where(unknown, torch.tensor(1.0) if unknown.all() else values[~unknown].mean(), values)


def _score_held(block: LoadedBlock, rescore: Rescore, most: int, chunk_size: int | None) -> CandidateScores:
    """Score the rows that were held back, in as many forward passes as every rank makes, since they may exchange.

    Args:
        block: Block with the rows.
        rescore: Function that scores rows.
        most: Largest number of rows that a rank holds back, above 0.
        chunk_size: Largest number of rows in a forward pass; None for any.
    """
    count = len(block.held["sample_id"])
    num_passes = -(-most // (chunk_size or most))
    size = max(1, -(-count // num_passes))
    places = torch.arange(size * num_passes) % max(1, count)
    rows = block.held if count else block.spare
    if len(places) > count:
        rows = {name: value[places.to(value.device)] for name, value in rows.items()}
    return rescore(rows, size).subset(torch.arange(count))
