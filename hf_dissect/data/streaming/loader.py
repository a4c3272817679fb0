"""Make candidate batches of a stream that is split over processes and workers and resumes exactly after a stop."""

import itertools
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_dissect.data.streaming.pair_stream import PairStream
from hf_dissect.data.streaming.parts import Place, StreamPart, check_whole, count_separate_shards, has_own_shuffle
from hf_dissect.data.streaming.shuffle import BlockShuffle, BlockState
from hf_dissect.data.streaming.spread_copies import SpreadCopies, read_again

logger = logging.getLogger(__name__)

_SKIPPED = "skipped_shards"
"""Key of a worker's state for the shards that it has not read to their end, see `record_skipped`."""
_COPIES, _LOOKED_UP = "copies", "looked_up"
"""Keys of a balanced stream: places of the pairs that wait for the next batch, see `SpreadCopies`, and the numbers of
pairs that the sampling file knows and lacks."""

Batch = dict[str, torch.Tensor]
Rows = list[dict[str, Any]]
Collator = Callable[[Sequence[dict[str, Any]]], Batch]
Pick = Callable[[Rows, int], Rows]
"""Function from the undecoded rows of a block and the number of its batch in this process to the rows to collate.

If it has a method `begin`, the function that this returns for the number of the next batch goes to the workers.
"""


@dataclass(frozen=True)
class _Settings:
    """Settings on which a saved place depends, by the names that a warning uses."""

    rank: int
    world_size: int
    num_workers: int
    batch_size: int
    seed: int
    shuffle_buffer: int
    num_shards: int
    balance: str | None = None


class StreamLoader:
    """Endless candidate batches of a stream that is split over ranks and workers, with a place that can be saved.

    Each worker of each process reads its own part of the stream, pass after pass (see `StreamPart`), so that a pass
    returns every pair exactly once. A batch holds pairs of one part and may span two passes. It is never short, so no
    process waits for another. `iter` continues after the last batch returned; use one iterator at a time.

    Args:
        stream: Whole stream, the same on all ranks.
        collator: Function that makes a batch of `batch_size` pairs, in the worker.
        batch_size: Number of pairs in a batch of this rank.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        num_workers: Number of processes that read and collate for this one; with 0 it does so itself.
        seed: Seed of the orders of shards and pairs, the same on all ranks.
        shuffle_buffer: Number of pairs of each part that are held in memory and shuffled; the shards are shuffled,
            too. 0 keeps the order of the data.
        prefetch_factor: Number of batches that a worker prepares ahead, 2 if None.
        pin_memory: Whether to copy batches into page-locked memory.
        multiprocessing_context: Context that starts the workers; None takes the usual one.
        pick: Function of the worker that picks the rows to collate; None for all.

    Attributes:
        num_batches: Number of batches returned so far, in earlier runs that this one resumes, too.

    Raises:
        ValueError: If the stream is already split over the processes.
    """

    drop_last = True

    def __init__(
        self,
        stream: PairStream,
        collator: Collator,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        multiprocessing_context: Any = None,
        pick: Pick | None = None,
    ) -> None:
        check_whole(stream.rows)
        self.dataset = stream
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor if num_workers else None
        self.pin_memory = pin_memory
        self.multiprocessing_context = multiprocessing_context if num_workers else None
        num_shards = count_separate_shards(stream.rows)
        rule = None if stream.balance is None else stream.balance.fingerprint
        self._settings = _Settings(rank, world_size, num_workers, batch_size, seed, shuffle_buffer, num_shards, rule)
        self._has_reported = False
        self.pick = pick
        self.num_batches = 0
        self._restarts = 0
        self._turn = 0
        self._states = [BlockState().to_json() for _ in range(max(1, num_workers))]
        if has_own_shuffle(stream.rows):
            logger.warning(
                "The stream has a shuffle buffer of its own, which a resumed run finds empty: it will not see exactly "
                "the same pairs. Pass the stream unshuffled and let the trainer shuffle it."
            )

    @property
    def passes(self) -> int:
        """Pass over the data, from 0, of the slowest worker of this rank, as of the last batch returned."""
        return min(state["last_pass"] for state in self._states)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches after the last one returned.

        Raises:
            ValueError: If the stream has no rows, or a row or shard is unusable.
            RuntimeError: If a worker died.
        """
        generator = torch.Generator().manual_seed(
            self._settings.seed
        )  # otherwise the loader draws from the global one
        begin = getattr(self.pick, "begin", None)
        loader = DataLoader(
            _WorkerBatches(
                self.dataset,
                self.collator,
                self._settings,
                self._restarts,
                self._turn,
                self._states,
                pick=self.pick if begin is None else begin(self.num_batches),
                first=self.num_batches,
            ),
            batch_size=None,
            collate_fn=_keep_unchanged,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pin_memory=self.pin_memory,
            multiprocessing_context=self.multiprocessing_context,
            generator=generator,
        )
        batches = iter(loader)
        try:
            while True:
                yield self._accept(*next(batches))
        finally:
            # An error would keep this frame alive, and with it workers that wait for seconds before they are killed.
            del batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place of this rank after the last batch returned, in types that JSON has."""
        return {
            **asdict(self._settings),
            "restarts": self._restarts,
            "turn": self._turn,
            "num_batches": self.num_batches,
            "workers": list(self._states),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved place at the next `iter`.

        The place is lost if settings have changed. The pass then starts again, in another order, with a warning.
        """
        self.num_batches = state.get("num_batches", 0)  # states of earlier versions do not count
        for worker in state["workers"]:
            self.dataset.skipped_shards.update(worker.get(_SKIPPED, {}))
        changed = {name: value for name, value in asdict(self._settings).items() if state.get(name) != value}
        if not changed:
            self._restarts, self._turn, self._states = state["restarts"], state["turn"], list(state["workers"])
            return
        pass_number = min(worker["last_pass"] for worker in state["workers"])
        logger.warning(
            "The place in the stream was saved with %s, which is now %s: pass %d over the data starts anew, and some "
            "of its pairs may be seen twice.",
            ", ".join(f"{name} {state.get(name)}" for name in changed),
            ", ".join(map(str, changed.values())),
            pass_number,
        )
        start = BlockState(start=Place(pass_number), last_pass=pass_number).to_json()
        if self.dataset.skipped_shards:
            start[_SKIPPED] = dict(self.dataset.skipped_shards)
        self._restarts, self._turn = state["restarts"] + 1, 0
        self._states = [dict(start) for _ in self._states]

    def _accept(self, batch: Batch | ValueError, state: dict[str, Any]) -> Batch:
        if isinstance(batch, ValueError):
            raise batch
        self.num_batches += 1
        self._states[self._turn] = state
        self.dataset.skipped_shards.update(state.get(_SKIPPED, {}))
        self._turn = (self._turn + 1) % len(self._states)
        if self.dataset.balance is not None and not self._has_reported and self.passes:
            self._has_reported = True
            self._report_lacking(self.dataset.balance.weights.name)
        return batch

    def _report_lacking(self, name: str) -> None:
        """Warn once, after the first pass, if the sampling file lacks pairs."""
        known, lacking = np.array([state.get(_LOOKED_UP, (0, 0)) for state in self._states]).sum(0).tolist()
        if lacking:
            logger.warning(
                "data.sampling_file %s lacks %d of the %d pairs that were read so far (%.1f %%); each of them is "
                "visited once a pass.",
                *(name, lacking, known + lacking, 100 * lacking / (known + lacking)),
            )


class _WorkerBatches(IterableDataset):
    """Batches of one worker of a `StreamLoader`, each with the worker's state after it."""

    def __init__(
        self,
        stream: PairStream,
        collator: Collator,
        settings: _Settings,
        restarts: int,
        turn: int,
        states: list[dict[str, Any]],
        pick: Pick | None = None,
        first: int = 0,
    ) -> None:
        self.stream = stream
        self.collator = collator
        self.settings = settings
        self.restarts = restarts
        self.turn = turn
        self.states = list(states)
        self.pick = pick
        self.first = first

    def __iter__(self) -> Iterator[tuple[Batch | ValueError, dict[str, Any]]]:
        info = get_worker_info()
        # Torch asks its worker 0 first, which therefore takes the part whose turn it is.
        place = (self.turn + (info.id if info else 0)) % len(self.states)
        state = self.states[place]
        try:
            reader = self._choose_part(place)
            reader.skipped_shards.update(state.get(_SKIPPED, {}))
            spread, balance = None, self.stream.balance
            if balance is not None:
                balance.known, balance.lacking = state.get(_LOOKED_UP, (0, 0))
            pairs = self._open_part(reader, BlockState.from_json(_select_place(state)))
            if balance is not None:
                copies = read_again(reader.read, state.get(_COPIES, ()))
                spread = SpreadCopies(pairs, self.settings.batch_size, math.ceil(balance.max_visits), copies)
            for number in itertools.count(self.first + (info.id if info else 0), len(self.states)):
                rows = [next(pairs) for _ in range(self.settings.batch_size)] if spread is None else spread.draw()
                batch = self.collator(rows if self.pick is None else self.pick(rows, number))
                state = pairs.state.to_json()
                if spread is not None and balance is not None:
                    counts = [balance.known, balance.lacking]
                    state = {**state, _COPIES: spread.list_places(), _LOOKED_UP: counts}
                if reader.skipped_shards:
                    state = {**state, _SKIPPED: dict(reader.skipped_shards)}
                yield batch, state
        except ValueError as error:
            # Raised here, torch would bury the message, which is for people to read, in the worker's traceback.
            error.add_note(traceback.format_exc())
            yield error, state

    def _choose_part(self, number: int) -> StreamPart:
        settings = self.settings
        # Neighbouring parts belong to different ranks, so that shards in excess of the parts spread over the ranks.
        part, num_parts = number * settings.world_size + settings.rank, settings.world_size * len(self.states)
        seed = (0, settings.seed, self.restarts) if settings.shuffle_buffer else None
        return StreamPart(self.stream, part, num_parts, seed)

    def _open_part(self, reader: StreamPart, state: BlockState) -> BlockShuffle:
        settings = self.settings
        seed = (1, settings.seed, self.restarts, reader.part) if settings.shuffle_buffer else None
        return BlockShuffle(reader.read, settings.shuffle_buffer or settings.batch_size, seed, state)


def _select_place(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in (_SKIPPED, _COPIES, _LOOKED_UP)}


def _keep_unchanged(batch: Any) -> Any:
    return batch
