"""Online selection for any training loop: a batch of candidates goes in, the pairs worth a gradient come out."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.first_pairs import check_batch
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pairs import key_hash
from hf_dissect.data.problems import PROBLEM_KEY, read_problems
from hf_dissect.distributed import Ranks
from hf_dissect.models.loading import find_loss_kind
from hf_dissect.selection.block_choice import count_selected
from hf_dissect.selection.cheap_scoring import CheapScoring
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_access import TrainingRecorder, make_access
from hf_dissect.selection.ledger_plan import make_plan
from hf_dissect.selection.loaded_blocks import LoadedBlocks, take_block
from hf_dissect.selection.loop_hooks import Batch, LoopHooks
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.options import SCOPES
from hf_dissect.selection.reference.model import ReferenceModel
from hf_dissect.selection.scope import Kept, keep_rows, select_from_all, select_from_own
from hf_dissect.selection.scoring import CandidateScores, choose_autocast, score
from hf_dissect.selection.step_recorder import StepRecorder
from hf_dissect.selection.strategies import make_strategy
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.trace import SelectionTrace

__all__ = ["Batch", "LoopHooks", "OnlineSelector"]


class OnlineSelector:
    """Selector that keeps the pairs that a strategy chooses from each batch, and records the scores of all candidates.

    It works in any PyTorch loop; `DissectTrainer` uses one. Call `begin_epoch` before each epoch. For each batch of a
    `SelectionCollator`, call `select`, train on the batch that it returns, and pass the outputs to `record_training`.

    Args:
        strategy: Name of a strategy, or a `SelectionStrategy`.
        ratio: Selection ratio k / B, in (0, 1].
        num_samples: Number of pairs in the data set whose ids are row numbers; None for other ids.
        columns: Further columns of the ledger, such as those of an objective.
        scope: "local" (each rank selects from its own candidates) or "global" (from those of all ranks).
        seed: Seed of the random choices.
        kind: Loss of the model, "softmax" or "sigmoid"; None to recognise it from the model.
        scoring_batch_size: Candidates in one scoring forward pass; None for all.
        scores_all: True to score the candidates even if the strategy needs no scores.
        reference: Reference model, for a strategy that needs one; a dual encoder is frozen.
        padding: Value and side of the padding of tokenised captions, see `SelectionCollator.padding`.
        ranks: Processes of the run; None for the processes that `accelerate` sees.
        bad_rows: Counter of unreadable rows; None for one that never stops the run.
        trace: Trace of the selections; None for figures without a record.
        rescore_every: 1 to score every candidate in each step. With `m > 1`, the ledger decides before loading which
            candidates train, and of the others a share of `1 / m` is scored again, see `plan` and `finish_step`.
        shard_ledger: False to hold the whole ledger of ids that are not row numbers on each of several processes; True
            to split it over them, with the same results, see `ShardedLedger`.
        scoring_dtype: Type of the numbers in the forward pass that scores; None for that of the training.
        cheap_scoring: Smaller pictures or fewer patches in this forward pass; None for whole pictures.
        hooks: Functions of the loop around the selector.
        options: Keyword arguments of the strategy, if it is given by name.

    Attributes:
        ledger: `SampleLedger`, or `ShardedLedger`, with the last correlation of each pair and the strategy's columns.
        strategy: `SelectionStrategy` of the run.
        bad_rows: `BadRows`, the unreadable rows so far.
        plan: `LedgerPlan` that decides which candidates are loaded; None if all are.
        knows_reference: True if the ledger holds the scores of the reference, so that it need not score the batches.
        epoch: Current epoch, counted from 0.
        updated_epoch: Last epoch that began with an update of strategy and objective.

    Raises:
        ValueError: `ratio` or `scope` is not allowed, the strategy does not exist, or its reference is missing.
    """

    def __init__(
        self,
        strategy: SelectionStrategy | str = "dissect",
        ratio: float = 0.5,
        *,
        num_samples: int | None = None,
        columns: Sequence[str] = (),
        scope: str = "local",
        seed: int = 0,
        kind: str | None = None,
        scoring_batch_size: int | None = None,
        scores_all: bool = False,
        reference: ReferenceModel | nn.Module | None = None,
        padding: Mapping[str, tuple[int, str]] | None = None,
        ranks: Ranks | None = None,
        bad_rows: BadRows | None = None,
        trace: SelectionTrace | None = None,
        rescore_every: int = 1,
        shard_ledger: bool = True,
        scoring_dtype: torch.dtype | None = None,
        cheap_scoring: CheapScoring | None = None,
        hooks: LoopHooks = LoopHooks(),  # noqa: B008 (immutable)
        **options: Any,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: must be above 0 and at most 1.")
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r}: choose one of {', '.join(SCOPES)}.")
        self.strategy = make_strategy(strategy, **options) if isinstance(strategy, str) else strategy
        if self.strategy.reference and reference is None:
            raise ValueError(f"reference is missing: the strategy {self.strategy.name!r} needs a reference model.")
        self.reference = ReferenceModel(reference) if isinstance(reference, nn.Module) else reference
        self.cheap_scoring = CheapScoring() if cheap_scoring is None else cheap_scoring
        self.knows_reference = False
        self.plan = make_plan(self.strategy, ratio, rescore_every, seed, keeps_before=num_samples is None)
        self.cheap_scoring.check(self.plan is not None, self.reference is not None)
        planned = () if self.plan is None else self.plan.columns
        names = dict.fromkeys(("correlation", *self.strategy.columns, *columns, *planned))
        self.ratio = ratio
        self.scope = scope
        self.seed = seed
        self.kind = kind
        self.scoring_batch_size = scoring_batch_size
        self.scores_all = scores_all
        self.scoring_dtype = scoring_dtype
        self.padding = dict(padding or {})
        self.ranks = Ranks() if ranks is None else ranks
        self.bad_rows = BadRows(1.0, num_samples) if bad_rows is None else bad_rows
        self.trace = SelectionTrace() if trace is None else trace
        self.hooks = hooks
        self._access = make_access(num_samples, tuple(names), self.strategy, self.ranks, shard_ledger)
        self.ledger = self._access.ledger
        self._blocks = LoadedBlocks(self.plan, self.strategy, self._access, self.trace)
        self._recorder = StepRecorder(self.strategy, self._access, self._blocks, self.trace)
        self.epoch = 0
        self.updated_epoch = 0
        self._step = 0

    def begin_epoch(self, epoch: int, renew: Callable[[SampleLedger], None] | None = None) -> None:
        """Begin an epoch, or continue an epoch in its middle after a resume.

        Args:
            epoch: Number of the epoch, from 0. The strategy is updated when an epoch begins, not when it continues.
            renew: Function of the ledger that is called with the update, such as one that renews soft labels.
        """
        self._access.wait()
        self.epoch = epoch
        if epoch > self.updated_epoch:
            self.updated_epoch = epoch
            self.strategy.update(self.ledger)
            if renew is not None:
                renew(self.ledger)
        self.strategy.on_epoch_begin(epoch, self.ledger)
        self._blocks.begin_epoch(epoch)

    def select(
        self, model: nn.Module, batch: Batch, *, step: int | None = None, micro_step: int = 0
    ) -> dict[str, torch.Tensor]:
        """Select the pairs of a candidate batch that are worth a gradient, as many on every rank.

        Args:
            model: Dual encoder, wrapped or not, with the current weights.
            batch: Batch of `B` candidates from a `SelectionCollator`.
            step: Number of the optimiser step, part of the seed of random choices; None to count the calls.
            micro_step: Number of the batch within the step, if gradients are accumulated.

        Returns:
            Kept rows of the batch on the device of the model, with `pair_weight` float32 `(k,)`, the product of the
            weights of the strategy and of the data, if there are any; see `LoadedBlocks.keep` for a plan.

        Raises:
            TooManyBadRows: More rows are unreadable than `bad_rows` allows.
            ValueError: The batch of another collator lacks the ids, or holds something other than tensors.
        """
        batch, block = take_block(batch)
        check_batch(batch)
        step, self._step = self._step if step is None else step, self._step + 1
        self._access.wait()
        if micro_step == 0:
            self.strategy.begin_step()
            if self.strategy.past_model is not None:
                self.strategy.past_model.update(model)
        sample_id, problems = batch["sample_id"].cpu(), read_problems(batch)
        good = self.bad_rows.add(sample_id, batch.get("bad_reason", torch.zeros_like(sample_id)).cpu(), problems)
        batch = {name: value for name, value in batch.items() if name != PROBLEM_KEY}
        if block is not None:
            counts = self.hooks.exchange_size(int((block.inclusion[good] > 0).sum()), self.ranks)
            block.epoch, block.step = self.epoch, step
            return self._blocks.keep(self.hooks.move(model, batch), block, good, counts)
        sizes = self._recorder.begin(sample_id[good], self.hooks)
        self._blocks.pass_over(sizes)
        batch = self.hooks.move(model, batch)
        candidates = self.score(model, batch, sample_id, good).subset(good)
        kept = self._choose(candidates, sizes, step, micro_step)
        is_clean = batch["is_clean"].cpu()[good] if "is_clean" in batch else None
        self._recorder.note(candidates, kept, is_clean, sizes, (self.epoch, step))
        return self.cheap_scoring.expose(keep_rows(batch, good, kept, self.ranks, self.padding), step)

    def score(
        self, model: nn.Module, batch: Batch, sample_id: torch.Tensor, good: torch.Tensor | None = None
    ) -> CandidateScores:
        """Score `B` candidates by a forward pass without gradient, if the current epoch needs scores.

        Args:
            model: Dual encoder, wrapped or not.
            batch: Candidates on the device of the model.
            sample_id: Sample ids, int64 `(B,)`, on the CPU.
            good: Positions of the readable candidates, int64 `(n,)`, whose scores must be finite; None for all.

        Returns:
            Scores of the candidates; without embeddings if the current epoch needs no scores.
        """
        if not self.scores_candidates:
            return CandidateScores(sample_id)
        with self.hooks.measure("scoring"):
            scores = self._score(model, batch, sample_id)
            past, readable = self.strategy.past_model, slice(None) if good is None else good
            if past is not None and past.is_ready:
                with past.in_place_of(model):
                    scores.past_correlation = self._score(model, batch, sample_id).correlation
            if self.reference is not None and (self.strategy.reference == "batch" or not self.knows_reference):
                chunk_size, autocast = self.scoring_batch_size, self.hooks.autocast
                scores.reference = self.reference.score(batch, sample_id, chunk_size=chunk_size, autocast=autocast)
            self.hooks.check_finite(scores.correlation[readable], "the correlation", sample_id[readable])
        return scores

    def _score(
        self, model: nn.Module, batch: Batch, sample_id: torch.Tensor, chunk_size: int | None = None
    ) -> CandidateScores:
        kind, autocast = self.kind or find_loss_kind(model), self.hooks.autocast
        autocast = choose_autocast(model, self.scoring_dtype, autocast)
        size = chunk_size or self.scoring_batch_size
        with self.cheap_scoring.prepare(model, forward_inputs(model, batch)) as inputs:
            return score(model, inputs, sample_id, kind=kind, chunk_size=size, autocast=autocast)

    @property
    def monitor(self) -> SelectionMonitor:
        """Figures of the selections."""
        return self.trace.monitor

    @property
    def scores_candidates(self) -> bool:
        """True if the candidates of the current epoch are scored before the selection."""
        return self.scores_all or self.strategy.needs_scores(self.epoch)

    def record_training(
        self,
        sample_id: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        evidence: Mapping[str, torch.Tensor] | None = None,
        objective: TrainingRecorder | None = None,
    ) -> None:
        """Record the correlations of the trained pairs, if their candidates were not scored, and evidence about them.

        Args:
            sample_id: Sample ids of the `b` trained pairs, int64 `(b,)`.
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            evidence: Evidence about the pairs by name, `(b,)` each; None without any.
            objective: Objective that records the evidence; None without one.
        """
        self._recorder.record_training(sample_id, outputs, evidence or {}, objective, self.scores_candidates)

    def fetch(self, sample_id: torch.Tensor | None) -> None:
        """Begin to read the ledger for an objective of pairs about to train, int64 `(b,)`; None if it reads none."""
        if sample_id is not None:
            self._access.fetch(sample_id)

    def finish_step(self, model: nn.Module) -> None:
        """End the training step of a batch, before or after the weights change.

        It matters with `rescore_every`, and brings the exchanges of a `ShardedLedger` to their end.

        Candidates that a plan loaded to be scored are scored among those that trained, and the ledger gets the scores
        of both. Every rank calls this method once for each batch that `select` returned, in the same order.

        Args:
            model: Dual encoder that trained, wrapped or not.
        """

        def score_rows(rows: Batch, chunk_size: int) -> CandidateScores:
            with self.hooks.measure("scoring"):
                scores = self._score(model, rows, rows["sample_id"].cpu(), chunk_size)
                self.hooks.check_finite(scores.correlation, "the correlation", scores.sample_id)
            return scores

        rescore = score_rows if self.strategy.needs_scores(self.epoch) else None
        self._blocks.finish(model, self.kind or find_loss_kind(model), rescore, self.scoring_batch_size)
        self._access.wait()

    def save_ledger(self, folder: str | os.PathLike[str], *, is_first: bool) -> None:
        """Write the ledger to a folder, of a `ShardedLedger` the own shard; `is_first` on one of the ranks."""
        self._access.save(folder, {"epoch": self.epoch, "strategy": self.strategy.name}, is_first)

    def join_saved_ledger(self, folder: str | os.PathLike[str]) -> None:
        """Replace the shards of the ledger in a folder by one file; every rank calls this method."""
        self._access.join_saved(folder)

    def pop_logs(self) -> dict[str, float]:
        """Return the figures of the selections since the last call, as `selection_*`; every rank calls this method."""
        return self.trace.pop_logs(self.ranks) | self.strategy.pop_logs()

    def reset(self, step: int = 0) -> None:
        """Count epochs from the beginning again, and discard the record of selections from step `step` on."""
        self._access.wait()
        self.epoch, self.updated_epoch, self._step, self.knows_reference = -1, 0, step, False
        self._blocks.reset()
        self.trace.restart(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs and the figures; the ledger is saved in its own file. Every rank calls this method."""
        self._access.wait()
        self.trace.flush()
        states = self.trace.join(self.ranks)
        return {
            "epoch": self.epoch,
            "updated_epoch": self.updated_epoch,
            **({"monitor": states[0]} if self.ranks.alone else {"monitors": states}),
            "strategy": self.strategy.state_dict(),
            "plan": None if self.plan is None else self.plan.state_dict(),
            "reference": self.reference.name if self.reference is not None and self.knows_reference else None,
            "past_model": None if self.strategy.past_model is None else self.strategy.past_model.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.epoch = state["epoch"]
        self.updated_epoch = state["updated_epoch"]
        self.trace.load_states([state["monitor"]] if "monitor" in state else state["monitors"], self.ranks)
        if state.get("strategy"):
            self.strategy.load_state_dict(state["strategy"])
        if self.plan is not None and state.get("plan"):
            self.plan.load_state_dict(state["plan"])
        self.knows_reference = self.reference is not None and state.get("reference") == self.reference.name
        if self.strategy.past_model is not None and state.get("past_model"):
            self.strategy.past_model.load_state_dict(state["past_model"])

    def _choose(self, candidates: CandidateScores, sizes: list[int], step: int, micro_step: int) -> Kept:
        chooses_alone = self.scope == "local" or self.strategy.keeps_all or self.ranks.alone
        chooser = self.ranks.own if chooses_alone else 0
        self.strategy.generator.manual_seed(key_hash(f"{self.seed}/{step}/{micro_step}/{chooser}"))
        choose = select_from_own if chooses_alone else partial(select_from_all, ranks=self.ranks)
        if not chooses_alone:
            self._access.share_fetched(sizes)
        return choose(self.strategy, candidates, self.ledger, sizes, self._num_selected)

    def _num_selected(self, num_candidates: int) -> int:
        if self.strategy.keeps_all:
            return num_candidates
        return count_selected(self.strategy.choose_ratio(self.ratio), num_candidates)
