"""The pass of a reference model over all pairs before the first step, and the loading of the pairs that it chose."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.data.pairs import key_hash
from hf_dissect.data.problems import PROBLEM_KEY
from hf_dissect.evaluation.passes import show_pass
from hf_dissect.selection.coreset import Coreset, CoresetSampler
from hf_dissect.selection.reference.model import EmbeddingStore, ReferenceModel
from hf_dissect.selection.scope import GatheredScores
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.selector import OnlineSelector
from hf_dissect.training.checkpoints import find_last_checkpoint
from hf_dissect.training.interruption import StoppedBySignal, StopRequest


class ReferencePass(TrainerCallback):
    """Callback that has the reference model score all pairs when training begins.

    The pairs are read once, in shuffled batches of nearly the size of the candidate batches, so that the losses have
    as many negatives as in training; with the selection scope "global", these are the pairs of all ranks. What the
    strategy keeps of the scores is written to the ledger after the last batch. So a pass that is interrupted leaves
    nothing, and a checkpoint holds all of it. A strategy that needs the embeddings of every batch ("batch") gets them
    from an `EmbeddingStore`, if that is small enough; it is not in checkpoints, and a resumed run fills it again.

    Streams have no such pass: the reference scores each of their batches.

    Args:
        selector: Selector of the run.
        stop_request: Request to end the run.
    """

    def __init__(self, selector: OnlineSelector, stop_request: StopRequest) -> None:
        self._selector = selector
        self._stop_request = stop_request
        self._store: EmbeddingStore | None = None
        self._count = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score all pairs, unless the strategy needs no reference, or a checkpoint brought its scores.

        Raises:
            StoppedBySignal: A process received SIGTERM.
        """
        selector, loader = self._selector, kwargs["train_dataloader"]
        if selector.reference is None or self._is_done() or not hasattr(getattr(loader, "dataset", None), "__len__"):
            return
        selector.reference.store = None
        self._store = None
        with selector.hooks.measure("scoring"):
            batches = self._read(loader, args)
            columns: list[dict[str, torch.Tensor]] = []
            for batch in show_pass(batches, "scores of the reference", total=self._count, shown=not args.disable_tqdm):
                scores, sizes = self._score(selector.reference, batch, args)
                if selector.strategy.reference != "batch":
                    columns.append(self._measure(scores, sizes))
                elif not self._keep_embeds(scores, sizes):
                    return
            self._write(columns)

    def _is_done(self) -> bool:
        selector = self._selector
        if selector.strategy.reference == "batch":
            return False
        values = [selector.ledger.column(name) for name in selector.strategy.columns]
        return selector.knows_reference and all(bool(value.isfinite().any()) for value in values)

    def _read(self, loader: DataLoader, args: TrainingArguments) -> Iterator[dict[str, torch.Tensor]]:
        dataset: Any = loader.dataset
        ranks, size = self._selector.ranks, args.train_batch_size
        generator = torch.Generator().manual_seed(key_hash(f"reference/{self._selector.seed}"))
        order = torch.randperm(len(dataset), generator=generator)
        self._count = math.ceil(len(order) / (size * ranks.count))
        own = [part.tensor_split(ranks.count)[ranks.own].tolist() for part in order.tensor_split(self._count)]
        return iter(
            DataLoader(
                dataset,
                batch_sampler=own,
                collate_fn=loader.collate_fn,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                multiprocessing_context=args.dataloader_multiprocessing_context,
                generator=generator,  # so that the random stream of the training is not touched
            )
        )

    def _score(
        self, reference: ReferenceModel, batch: dict[str, torch.Tensor], args: TrainingArguments
    ) -> tuple[CandidateScores, list[int]]:
        """Score a batch, and return the scores of its readable pairs and the number of them on each rank."""
        selector, sample_id = self._selector, batch["sample_id"].cpu()
        (good,) = (batch.get("bad_reason", torch.zeros_like(sample_id)).cpu() == 0).nonzero(as_tuple=True)
        sizes, stops = selector.ranks.gather_numbers(len(good), self._stop_request.made).T.tolist()
        if any(stops):
            self._stop_request.grant_if(True)
            raise StoppedBySignal(str(find_last_checkpoint(str(args.output_dir)) or "its beginning"))
        batch = {name: value for name, value in batch.items() if name != PROBLEM_KEY}
        batch = selector.hooks.prepare(batch) if selector.hooks.prepare is not None else batch
        chunk_size, autocast = selector.scoring_batch_size, selector.hooks.autocast
        return reference.score(batch, sample_id, chunk_size=chunk_size, autocast=autocast).subset(good), sizes

    def _measure(self, scores: CandidateScores, sizes: list[int]) -> dict[str, torch.Tensor]:
        """Measure what the strategy keeps of the scores, and return it for the pairs of all ranks."""
        selector, ranks = self._selector, self._selector.ranks
        joins = selector.scope == "global" and not ranks.alone
        values = selector.strategy.measure_reference(GatheredScores(scores, sizes, ranks) if joins else scores)
        start = sum(sizes[: ranks.own]) if joins else 0
        own = {name: value[start : start + len(scores.sample_id)] for name, value in values.items()}
        for value in own.values():
            selector.hooks.check_finite(value, "a score of the reference", scores.sample_id)
        return ranks.gather_columns({"sample_id": scores.sample_id, **own}, sizes)

    def _keep_embeds(self, scores: CandidateScores, sizes: list[int]) -> bool:
        """Keep the embeddings of the pairs of all ranks; return False if there is no room for those of all pairs."""
        ranks, embeds = self._selector.ranks, torch.stack(scores.get_embeds(), 1).to("cpu", torch.float16)
        num_samples, dim = self._selector.ledger.num_samples, embeds.shape[2]
        if num_samples is None or not EmbeddingStore.fits(num_samples, dim):
            return False
        sample_id = ranks.gather_columns({"sample_id": scores.sample_id}, sizes)["sample_id"]
        everyone = ranks.gather_rows(embeds, sizes)
        self._store = EmbeddingStore(num_samples, dim) if self._store is None else self._store
        self._store.write(sample_id, everyone[:, 0], everyone[:, 1])
        return True

    def _write(self, columns: list[dict[str, torch.Tensor]]) -> None:
        selector = self._selector
        if selector.reference is not None:
            selector.reference.store = self._store
        for part in columns:
            sample_id = part.pop("sample_id")
            for name, values in part.items():
                selector.ledger.write(name, sample_id, values)
        selector.knows_reference = bool(columns)


def plan_loading(
    selector: OnlineSelector, pairs: Any, batch_size: int, sampler_of: Callable[[Any], Any]
) -> tuple[int, Callable[[Any], Any]]:
    """Plan how many pairs a step loads, and which.

    Args:
        selector: Selector of the run.
        pairs: Training pairs with a length.
        batch_size: Number of candidates of a step.
        sampler_of: Function from a data set to the sampler of the Trainer.

    Returns:
        Number of pairs to load, and function from the data set to the sampler of their positions: those of the coreset
        for `Coreset`, otherwise those that were given.
    """
    if not isinstance(selector.strategy, Coreset):
        return batch_size, sampler_of
    ids = getattr(pairs, "sample_ids", None)
    sample_ids = torch.arange(len(pairs)) if ids is None else torch.as_tensor(ids)
    sampler = CoresetSampler(selector.ledger, sample_ids, selector.ratio, selector.seed)
    return max(2, round(selector.ratio * batch_size)), lambda dataset: sampler
