"""Record of a step: the choice goes to the trace, and what was measured of the pairs to the ledger."""

from collections.abc import Mapping

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_access import LedgerAccess, TrainingRecorder
from hf_dissect.selection.loaded_blocks import LoadedBlocks
from hf_dissect.selection.loop_hooks import LoopHooks
from hf_dissect.selection.scope import Kept, describe_selection
from hf_dissect.selection.scoring import CandidateScores, compute_correlation
from hf_dissect.selection.strategy import SelectionStrategy
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.selection.usage import count_visits, read_visits


class StepRecorder:
    """Recorder of the selections and of the pairs that train.

    Args:
        strategy: Strategy of the run.
        access: Access of the steps to the ledger of the run.
        blocks: Keeper of the blocks of which a plan loaded a part.
        trace: Trace of the selections.
    """

    def __init__(
        self, strategy: SelectionStrategy, access: LedgerAccess, blocks: LoadedBlocks, trace: SelectionTrace
    ) -> None:
        self._strategy = strategy
        self._access = access
        self._blocks = blocks
        self._trace = trace

    def begin(self, sample_id: torch.Tensor, hooks: LoopHooks) -> list[int]:
        """Exchange the numbers of candidates of the ranks, and begin to read what the ledger holds of the own ones.

        Args:
            sample_id: Ids of the readable candidates of this rank, int64 `(n,)`.
            hooks: Functions of the loop.

        Returns:
            Number `n` of each rank.
        """
        route, split = self._access.plan(sample_id), None
        if route is None:
            sizes = hooks.exchange_size(len(sample_id), self._access.ranks)
        else:
            sizes, split = hooks.exchange_route(len(sample_id), route.fullest, self._access.ranks)
        self._access.fetch(sample_id, route, split)
        return sizes

    def note(
        self,
        candidates: CandidateScores,
        kept: Kept,
        is_clean: torch.Tensor | None,
        sizes: list[int],
        place: tuple[int, int],
    ) -> None:
        """Write the choice of this rank to the trace, and the scores of its candidates to the ledger.

        Args:
            candidates: Scores of the `n` readable candidates of this rank.
            kept: Choice of this rank.
            is_clean: Truth of the candidates, bool `(n,)`; None if it is unknown.
            sizes: Number `n` of each rank.
            place: Epoch and optimiser step.
        """
        kept = self._blocks.add_evidence(kept, candidates, sizes)
        columns = describe_selection(candidates, kept, is_clean)
        self._blocks.note_whole(columns)
        columns |= read_visits(self._strategy, self._access.ledger, candidates.sample_id)
        self._trace.observe(*place, columns, sizes, self._access.ranks)
        if "correlation" in columns:
            scored = {name: columns[name] for name in ("sample_id", "correlation")}
            sums = self._strategy.summarize(kept.measured)
            columns = {**scored, **kept.measured}
            observe = self._strategy.observe
            self._access.record(columns, sizes, self._blocks.write, sums, observe, is_fetched=True)
        if self._strategy.usage_penalty:
            self._access.record({"sample_id": candidates.sample_id[kept.indices]}, kept.counts, count_visits)

    def record_training(
        self,
        sample_id: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        evidence: Mapping[str, torch.Tensor],
        objective: TrainingRecorder | None,
        is_scored: bool,
    ) -> None:
        """Record the correlations of the trained pairs, if their candidates were not scored, and evidence.

        Args:
            sample_id: Sample ids of the `b` trained pairs, int64 `(b,)`.
            outputs: Outputs of the model, with `image_embeds` and `text_embeds` `(b, D)`.
            evidence: Evidence about the pairs by name, `(b,)` each.
            objective: Objective that records the evidence; None without one.
            is_scored: True if the candidates were scored.
        """
        columns = {"sample_id": sample_id, **evidence}
        if not self._blocks.add_outputs(outputs) and not is_scored:
            columns["correlation"] = compute_correlation(outputs["image_embeds"], outputs["text_embeds"]).detach()
        if len(columns) == 1:
            return

        def write(ids: torch.Tensor, arrived: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
            if "correlation" in arrived:
                ledger.write("correlation", ids, arrived["correlation"])
                self._strategy.record(ids, arrived["correlation"], ledger, None)
            if objective is not None:
                objective.record(ids, arrived, ledger)

        sums = None if objective is None else objective.summarize(evidence)
        observe = None if objective is None else objective.observe
        self._access.record(columns, [len(sample_id)] * self._access.ranks.count, write, sums, observe)
