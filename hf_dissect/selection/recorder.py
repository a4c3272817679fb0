"""The full record of a run's choices as Parquet, one row per candidate and step."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
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
_ROWS_PER_PART = 1_000_000


class SelectionRecorder:
    """Writes parts beside each other while the run goes on, and joins them to one `selection.parquet` at its end.

    A part never reaches across a checkpoint, so a resumed run drops what was recorded after its checkpoint and goes
    on.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / "selection.parquet"
        self._parts = Path(folder) / "selection_parts"
        self._rows: list[dict[str, np.ndarray]] = []
        self._num_rows = 0

    def add(
        self, epoch: int, step: int, sample_id: torch.Tensor, correlation: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Record one selection: `sample_id` int64, `correlation` float32, `kept` bool, each `(B,)` on the CPU."""
        size = len(sample_id)
        self._rows.append(
            {
                "epoch": np.full(size, epoch, dtype=np.int32),
                "step": np.full(size, step, dtype=np.int64),
                "sample_id": sample_id.numpy(),
                "correlation": correlation.numpy(),
                "kept": kept.numpy(),
            }
        )
        self._num_rows += size
        if self._num_rows >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what is held in memory as a part named after its first step."""
        if not self._rows:
            return
        self._parts.mkdir(parents=True, exist_ok=True)
        columns = {name: np.concatenate([rows[name] for rows in self._rows]) for name in SCHEMA.names}
        first_step = int(columns["step"][0])
        # Parts of one step (gradient accumulation) must not overwrite each other.
        place = self._parts / f"{first_step:012d}-{len(list(self._parts.glob('*.parquet'))):06d}.parquet"
        pq.write_table(pa.table(columns, schema=SCHEMA), place.with_suffix(".tmp"))
        os.replace(place.with_suffix(".tmp"), place)
        self._rows, self._num_rows = [], 0

    def restart(self, step: int) -> None:
        """Forget what was recorded from optimiser step `step` on; called when a run begins (0) or resumes."""
        self._rows, self._num_rows = [], 0
        for part in self._parts.glob("*.parquet"):
            if int(part.name.split("-")[0]) >= step:
                part.unlink()

    def close(self) -> Path:
        """Join the parts in order to `selection.parquet` and remove them."""
        self.flush()
        temporary = self.path.with_suffix(".tmp")
        parts = sorted(self._parts.glob("*.parquet"))
        with pq.ParquetWriter(temporary, SCHEMA) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
        os.replace(temporary, self.path)
        for part in parts:
            part.unlink()
        if self._parts.is_dir():
            self._parts.rmdir()
        return self.path
