"""Trace of the selections of a run: figures for the logs and, on request, a record of every choice."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_dissect.distributed import Ranks
from hf_dissect.selection.monitor import SelectionMonitor, join_monitors, name_logs
from hf_dissect.selection.recorder import SelectionRecorder


class SelectionTrace:
    """Observer of each selection.

    Each process observes its own candidates. Only for a record do the candidates of all come together in each step;
    the figures are joined when they are asked for.

    Args:
        folder: Run folder to write `selection.parquet` to; None for figures without a record. Of several processes,
            one alone needs a folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._own = SelectionMonitor()
        self._joined: SelectionMonitor | None = None  # of several ranks, what all had observed when last asked
        self._recorder = None if folder is None else SelectionRecorder(folder)
        self._records: bool | None = None  # unknown until the ranks have talked about it

    @property
    def monitor(self) -> SelectionMonitor:
        """Figures of the selections, those of all ranks at the last checkpoint or at the end of the run."""
        return self._own if self._joined is None else self._joined

    def observe(
        self, epoch: int, step: int, candidates: Mapping[str, torch.Tensor], sizes: Sequence[int], ranks: Ranks
    ) -> None:
        """Observe one selection; every rank calls this method.

        Args:
            epoch: Epoch of the selection, from 0.
            step: Optimiser step of the selection, from 0.
            candidates: Columns of the candidates of this rank, `(sizes[own],)` each: `sample_id`, `kept`, `priority`
                (NaN for a strategy without a ranking) and, if they are known, `correlation` (NaN for a pair that was
                never scored) and `is_clean`; with a plan, `loaded` and `scored`; with a penalty of usage, `visits`. A
                record needs the correlation.
            sizes: Number of candidates of each rank.
            ranks: Processes of the run.
        """
        sample_id, kept, correlation = candidates["sample_id"], candidates["kept"], candidates.get("correlation")
        names = ("priority", "is_clean", "loaded", "scored", "visits")
        self._own.observe(epoch, sample_id, kept, correlation, *map(candidates.get, names))
        if self._records is None:
            self._records = bool(ranks.gather_numbers(self._recorder is not None).any())
        if self._records:
            recorded = {name: candidates[name] for name in ("sample_id", "correlation", "kept")}
            everyone = ranks.gather_columns(recorded, sizes)
            if self._recorder is not None:
                self._recorder.add(epoch, step, *everyone.values())

    def pop_logs(self, ranks: Ranks) -> dict[str, float]:
        """Return the figures since the last call, as `selection_*`; every rank calls this method."""
        return name_logs(ranks.gather_objects(self._own.pop_sums()))

    def join(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Join the figures of all ranks for `monitor`, and return the states of all; every rank calls this method."""
        states = ranks.gather_objects(self._own.state_dict())
        self._join(states)
        return states

    def load_states(self, states: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
        """Continue from the states of all ranks, of which there may have been another number."""
        self._own = SelectionMonitor()
        if len(states) == ranks.count:
            self._own.load_state_dict(states[ranks.own])
        elif ranks.own == 0:
            self._own.load_state_dict(join_monitors(states))
        if not ranks.alone:
            self._join(states)

    def _join(self, states: Sequence[Mapping[str, Any]]) -> None:
        if len(states) > 1:
            self._joined = SelectionMonitor()
            self._joined.load_state_dict(join_monitors(states))

    def restart(self, step: int) -> None:
        """Discard the record from optimiser step `step` on, because a resumed run repeats these steps."""
        if self._recorder is not None:
            self._recorder.restart(step)

    def flush(self) -> None:
        """Write the record so far to the disk."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self, ranks: Ranks | None = None) -> None:
        """Complete the file of the record, and join the figures of all `ranks`, whose processes all call this."""
        if ranks is not None and not ranks.alone:
            self.join(ranks)
        if self._recorder is not None:
            self._recorder.close()
