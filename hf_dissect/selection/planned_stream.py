"""Plans for streams: files that data workers look pairs up in, each from a batch on that no worker has begun yet."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_dissect.selection.block_choice import BlockRule, LoadedRows
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_plan import PLAN_BEFORE, PLAN_COLUMN


class StreamPlanFiles:
    """Folder of plans for a stream, 12 bytes a pair and plan, of which the two newest are kept.

    Workers read ahead, so that a plan cannot hold from the moment on at which it is made. It holds from the first
    batch that no worker can have begun: `lag` batches later. Until then, the plan before it holds.

    Args:
        lag: Number of batches that the workers prepare ahead.
        position: Function that returns the number of batches that this process has read.
    """

    def __init__(self, lag: int, position: Callable[[], int]) -> None:
        self.lag = lag
        self.position = position
        self._folder = TemporaryDirectory(prefix="hf-dissect-plan-")

    def picker(self, rule: BlockRule) -> "StreamPicker":
        """Return the function by which a worker picks the pairs of a block."""
        return StreamPicker(rule, self._folder.name, self.lag)

    def publish(self, epoch: int | None, ledger: SampleLedger, begun: Sequence[int | None]) -> None:
        """Write the plans that are not in the folder yet, and remove those that no worker reads any more.

        Args:
            epoch: Epoch, from 0; None to load all pairs.
            ledger: Ledger with the plans in the columns `planned_before` and `planned`.
            begun: Number of batches that were read when each of the two was made; None for no plan.
        """
        folder = Path(self._folder.name)
        wanted = dict(zip(begun, (PLAN_BEFORE, PLAN_COLUMN), strict=True))
        for path in folder.iterdir():
            if int(path.name.split(".")[0]) not in wanted:
                path.unlink()
        for number, column in wanted.items():
            if number is not None and not _find_ids(folder, number).exists():
                ids = ledger.ids
                order = ids.argsort()
                np.save(_find_values(folder, number), ledger.column(column)[order].numpy())
                unfinished = folder / f"{number}.unfinished.npy"
                np.save(unfinished, ids[order].numpy())
                os.replace(unfinished, _find_ids(folder, number))


class StreamPicker:
    """Function of a data worker that picks the pairs of a block which the plan chose, before they are decoded.

    Args:
        rule: Rule of the choice in a block.
        folder: Folder of the plans.
        lag: Number of batches after which a plan holds.
    """

    def __init__(self, rule: BlockRule, folder: str, lag: int) -> None:
        self.rule = rule
        self.folder = folder
        self.lag = lag
        self._begun = -1
        self._ids: np.ndarray = np.zeros(0, np.int64)
        self._values: np.ndarray = np.zeros(0, np.float32)

    def __call__(self, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        """Return the rows to load as `LoadedRows`, or all of them if no plan holds.

        Args:
            rows: Undecoded rows of a block, with `sample_id`.
            number: Number of the batch among those of this process.
        """
        begun = [int(name.split(".")[0]) for name in os.listdir(self.folder) if name.endswith(".ids.npy")]
        latest = max((one for one in begun if one + self.lag <= number), default=None)
        if latest is None:
            return rows
        if latest != self._begun:
            folder = Path(self.folder)
            self._ids, self._values = (
                np.load(find(folder, latest), mmap_mode="r") for find in (_find_ids, _find_values)
            )
            self._begun = latest
        ids = torch.tensor([row["sample_id"] for row in rows])
        loaded = self.rule.choose(ids, self._look_up(ids.numpy()), number)
        if "is_clean" in rows[0]:
            left = set(range(len(rows))) - set(loaded.rows.tolist())
            truths = torch.tensor([bool(rows[row]["is_clean"]) for row in sorted(left)], dtype=torch.bool)
            loaded = replace(loaded, unloaded={**loaded.unloaded, "unloaded_clean": truths})
        return LoadedRows([rows[row] for row in loaded.rows.tolist()], loaded)

    def _look_up(self, ids: np.ndarray) -> torch.Tensor:
        if not len(self._ids):
            return torch.full((len(ids),), torch.nan)
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        values = np.where(self._ids[places] == ids, self._values[places], np.nan)
        return torch.from_numpy(values.astype(np.float32))


def _find_ids(folder: Path, number: int) -> Path:
    return folder / f"{number}.ids.npy"


def _find_values(folder: Path, number: int) -> Path:
    return folder / f"{number}.values.npy"
