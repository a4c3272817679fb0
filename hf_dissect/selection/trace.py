"""What the selection of a run leaves behind: figures for the logs and, where asked for, a record of every choice."""

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_dissect.ranks import Ranks
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.recorder import SelectionRecorder
from hf_dissect.selection.scoring import CandidateScores


class SelectionTrace:
    """Observes each selection; the first rank writes the record of all ranks.

    Args:
        folder: the run folder.
        ranks: the processes of the run.
        records: whether `selection.parquet` is written.
        is_first_rank: whether this process writes it.
    """

    def __init__(self, folder: str | Path, ranks: Ranks, *, records: bool, is_first_rank: bool):
        self.monitor = SelectionMonitor()
        self._ranks, self._records = ranks, records
        self._recorder = SelectionRecorder(folder) if records and is_first_rank else None

    def observe(
        self,
        epoch: int,
        step: int,
        batch: Mapping[str, torch.Tensor],
        candidates: CandidateScores,
        good: torch.Tensor,
        indices: torch.Tensor,
        priority: torch.Tensor | None,
    ) -> None:
        """Take note of one selection.

        Args:
            epoch, step: when it was made.
            batch: of `B` candidates, with `is_clean` where the truth is known.
            candidates: scores of the `n` readable ones.
            good: int64 `(n,)`, their places in the batch.
            indices: int64 `(k,)`, which of the `n` are kept.
            priority: `(n,)`, what the strategy ranks them by, if it tells.
        """
        kept = torch.zeros(candidates.num_candidates, dtype=torch.bool)
        kept[indices] = True
        correlation = None if candidates.image_embeds is None else candidates.correlation
        is_clean = batch["is_clean"].cpu()[good] if "is_clean" in batch else None
        self.monitor.observe(epoch, candidates.sample_id, kept, correlation, priority, is_clean)
        if not self._records:
            return
        columns = [self._ranks.gather_ragged(part) for part in (candidates.sample_id, correlation, kept)]
        if self._recorder is not None:
            self._recorder.add(epoch, step, *columns)

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
