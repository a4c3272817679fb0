"""The full record of a run's selections as Parquet, one row per candidate and step."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("sample_id", pa.int64()),
        ("correlation", pa.float32()),
        ("kept", pa.bool_()),
    ]
)
ROWS_PER_PART = 1_000_000


class SelectionRecorder:
    """Recorder that writes parts during the run, and joins them into one `selection.parquet` at its end.

    A part never spans a checkpoint, so that a resumed run drops the parts written after its checkpoint and continues.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "selection.parquet"
        self._parts = Path(folder) / "selection_parts"
        self._unfinished = Path(folder) / "selection_parts.unfinished"
        self._rows: list[dict[str, np.ndarray]] = []
        self._num_rows = 0

    def add(
        self, epoch: int, step: int, sample_id: torch.Tensor, correlation: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Record one selection; all tensors are on the CPU.

        Args:
            epoch: Epoch, counted from 0.
            step: Optimiser step, counted from 0.
            sample_id: Ids of the candidates, int64 `(B,)`.
            correlation: Correlations, float32 `(B,)`.
            kept: Bool `(B,)`, True for a selected candidate.
        """
        size = len(sample_id)
        self._rows.append(
            {
                "epoch": np.full(size, epoch, dtype=np.int32),
                "step": np.full(size, step, dtype=np.int64),
                # Copied, because a tensor from a data loader's worker holds a file descriptor as long as it lives.
                "sample_id": np.array(sample_id, dtype=np.int64),
                "correlation": np.array(correlation, dtype=np.float32),
                "kept": np.array(kept, dtype=bool),
            }
        )
        self._num_rows += size
        if self._num_rows >= ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a part named after its first step."""
        if not self._rows:
            return
        columns = {name: np.concatenate([rows[name] for rows in self._rows]) for name in SCHEMA.names}
        self._write_part(pa.table(columns, schema=SCHEMA), self._parts)
        self._rows, self._num_rows = [], 0

    def restart(self, step: int) -> None:
        """Drop the rows from a step on; call this when a run starts (0) or resumes.

        If the run had finished and resumes from one of its checkpoints, its `selection.parquet` is continued.

        Args:
            step: Optimiser step from which the run continues.
        """
        self._rows, self._num_rows = [], 0
        shutil.rmtree(self._unfinished, ignore_errors=True)
        for part in self._parts_in_order():
            if int(part.name.split("-")[0]) >= step:
                part.unlink()
        if step > 0 and self.path.is_file() and not self._parts_in_order():
            self._split(step)

    def close(self) -> Path:
        """Join the parts in order into `selection.parquet`, remove them, and return its path."""
        self.flush()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with pq.ParquetWriter(temporary, SCHEMA) as writer:
            for part in self._parts_in_order():
                writer.write_table(pq.read_table(part))
        os.replace(temporary, self.path)
        # All parts disappear at once, so that a run killed here does not leave some that look like the whole record.
        shutil.rmtree(self._unfinished, ignore_errors=True)
        if self._parts.exists():
            os.replace(self._parts, self._unfinished)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        return self.path

    def _parts_in_order(self) -> list[Path]:
        return sorted(self._parts.glob("*.parquet"))

    def _split(self, step: int) -> None:
        """Split the finished record from before `step` into parts again; all of them, or none if killed."""
        with pq.ParquetFile(self.path) as recorded:
            for group in range(recorded.num_row_groups):
                rows = recorded.read_row_group(group)
                rows = rows.filter(pc.less(rows["step"], step))
                if len(rows):
                    self._write_part(rows, self._unfinished)
        shutil.rmtree(self._parts, ignore_errors=True)
        if self._unfinished.exists():
            os.replace(self._unfinished, self._parts)

    def _write_part(self, rows: pa.Table, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The number distinguishes parts of one step (gradient accumulation).
        name = f"{rows['step'][0].as_py():012d}-{len(list(folder.glob('*.parquet'))):06d}.parquet"
        pq.write_table(rows, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / name)
