"""Trace of the selections of a run: figures for the logs and, on request, a record of every choice."""

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.recorder import SelectionRecorder


class SelectionTrace:
    """Observer of each selection.

    Args:
        folder: Run folder to write `selection.parquet` to; None for figures without a record.

    Attributes:
        monitor: Figures of the selections.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.monitor = SelectionMonitor()
        self._recorder = None if folder is None else SelectionRecorder(folder)

    def observe(self, epoch: int, step: int, candidates: Mapping[str, torch.Tensor]) -> None:
        """Observe one selection.

        Args:
            epoch: Epoch of the selection, from 0.
            step: Optimiser step of the selection, from 0.
            candidates: Columns of the candidates of all ranks, `(n,)` each: `sample_id`, `kept`, `priority` (NaN for a
                strategy without a ranking) and, if they are known, `correlation` (NaN for a pair that was never
                scored) and `is_clean`; with a plan, `loaded` and `scored`; with a penalty of usage, `visits`. A record
                needs the correlation.
        """
        sample_id, kept, correlation = candidates["sample_id"], candidates["kept"], candidates.get("correlation")
        names = ("priority", "is_clean", "loaded", "scored", "visits")
        self.monitor.observe(epoch, sample_id, kept, correlation, *map(candidates.get, names))
        if self._recorder is not None:
            self._recorder.add(epoch, step, sample_id, candidates["correlation"], kept)

    def restart(self, step: int) -> None:
        """Discard the record from optimiser step `step` on, because a resumed run repeats these steps."""
        if self._recorder is not None:
            self._recorder.restart(step)

    def flush(self) -> None:
        """Write the record so far to the disk."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Complete the file of the record."""
        if self._recorder is not None:
            self._recorder.close()
