"""What the selection of a run leaves behind: figures for the logs and, where asked for, a record of every choice."""

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.recorder import SelectionRecorder


class SelectionTrace:
    """Observes each selection; the first rank writes the record.

    Args:
        folder: the run folder.
        records: whether `selection.parquet` is written.
        is_first_rank: whether this process writes it.
    """

    def __init__(self, folder: str | Path, *, records: bool, is_first_rank: bool):
        self.monitor = SelectionMonitor()
        self._recorder = SelectionRecorder(folder) if records and is_first_rank else None

    def observe(self, epoch: int, step: int, candidates: Mapping[str, torch.Tensor]) -> None:
        """Take note of one selection.

        Args:
            epoch, step: when it was made.
            candidates: of all ranks, `(n,)` each: `sample_id`, `kept`, `priority` (NaN where the strategy ranks by
                nothing), and where they are known `correlation` and `is_clean`.
        """
        sample_id, kept, correlation = candidates["sample_id"], candidates["kept"], candidates.get("correlation")
        self.monitor.observe(epoch, sample_id, kept, correlation, candidates["priority"], candidates.get("is_clean"))
        if self._recorder is not None:
            self._recorder.add(epoch, step, sample_id, correlation, kept)

    def restart(self, step: int) -> None:
        """Forget what was recorded from `step` on, which now comes again."""
        if self._recorder is not None:
            self._recorder.restart(step)

    def flush(self) -> None:
        """Write what was recorded so far."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Write the record to its end."""
        if self._recorder is not None:
            self._recorder.close()
