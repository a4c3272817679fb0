"""Access of a step to the ledger: values of its pairs are read, and what was measured of them is recorded."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from hf_dissect.distributed import Ranks
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.saved_ledger import LEDGER_FILE, read_ledger, write_ledger
from hf_dissect.selection.shard_group import Route
from hf_dissect.selection.sharded_ledger import Record, ShardedLedger
from hf_dissect.selection.strategy import SelectionStrategy, records_each_pair_alone

logger = logging.getLogger(__name__)


class TrainingRecorder(Protocol):
    """Objective that records evidence about the pairs that train."""

    def record(self, sample_id: torch.Tensor, evidence: Mapping[str, torch.Tensor], ledger: SampleLedger) -> None:
        """Write evidence to the ledger, see `RobustObjective`."""

    def summarize(self, evidence: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return sums over the own pairs, see `RobustObjective`."""

    def observe(self, sums: torch.Tensor) -> None:
        """Receive the sums over the pairs of all ranks, see `RobustObjective`."""


class LedgerAccess:
    """Access of every rank to a ledger that each holds as a whole.

    Args:
        ledger: Ledger of the run.
        ranks: Processes of the run.
    """

    def __init__(self, ledger: SampleLedger, ranks: Ranks) -> None:
        self.ledger = ledger
        self.ranks = ranks

    def plan(self, sample_id: torch.Tensor) -> Route | None:
        """Return the way of pairs of this rank to those that hold them, if they have to travel."""
        return None

    def fetch(self, sample_id: torch.Tensor, route: Route | None = None, split: int | None = None) -> None:
        """Begin to read the values of pairs of this rank for the next calls of `ledger.read`.

        Args:
            sample_id: Ids of the pairs, int64 `(B,)`.
            route: Their way, see `plan`; None if it was not planned.
            split: Largest `Route.fullest` of all ranks; None if it is unknown.
        """

    def share_fetched(self, sizes: Sequence[int]) -> None:
        """Let each rank read the fetched values of all, of which the ranks have `sizes`."""

    def record(
        self,
        columns: Mapping[str, torch.Tensor],
        sizes: Sequence[int],
        record: Record,
        sums: torch.Tensor | None = None,
        observe: Callable[[torch.Tensor], None] | None = None,
        is_fetched: bool = False,
    ) -> None:
        """Record what was measured of pairs, on every rank that holds them.

        Args:
            columns: Columns `(sizes[own],)` of the pairs of this rank with `sample_id`, the same names on every rank.
            sizes: Number of pairs of each rank.
            record: Function that writes pairs to a ledger.
            sums: Sums over the pairs of this rank, float64 `(m,)`; None on every rank for no exchange.
            observe: Function that receives the sums over the pairs of all ranks, added in the order of the ranks.
            is_fetched: True on every rank if these are the pairs of the last `fetch`, in its order.
        """
        gathered = self.ranks.gather_columns(columns, sizes)
        record(gathered.pop("sample_id"), gathered, self.ledger)
        if sums is not None and observe is not None:
            observe(self.ranks.add_up(sums))

    def wait(self) -> None:
        """Wait until what was begun is recorded."""

    def save(self, folder: str | os.PathLike[str], metadata: dict[str, object], is_first: bool) -> None:
        """Write the ledger to a folder, by the first process; every rank calls this method."""
        if is_first:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.ledger.save(Path(folder, LEDGER_FILE), metadata)

    def join_saved(self, folder: str | os.PathLike[str]) -> None:
        """Replace the shards in a folder by one file, if there are shards; every rank calls this method."""


class ShardAccess(LedgerAccess):
    """Access to a ledger of which each rank holds a shard.

    Args:
        ledger: Ledger of the run.
        ranks: Processes of the run.
    """

    ledger: ShardedLedger

    def plan(self, sample_id: torch.Tensor) -> Route | None:
        """Return the way of pairs to their homes; see `LedgerAccess.plan`."""
        return self.ledger.plan(sample_id)

    def fetch(self, sample_id: torch.Tensor, route: Route | None = None, split: int | None = None) -> None:
        """Ask the homes of pairs for their values while the model computes; see `LedgerAccess.fetch`."""
        self.ledger.fetch(self.ledger.plan(sample_id) if route is None else route, split)

    def share_fetched(self, sizes: Sequence[int]) -> None:
        """Exchange the fetched values; see `LedgerAccess.share_fetched`."""
        self.ledger.share_fetched(sizes)

    def record(
        self,
        columns: Mapping[str, torch.Tensor],
        sizes: Sequence[int],
        record: Record,
        sums: torch.Tensor | None = None,
        observe: Callable[[torch.Tensor], None] | None = None,
        is_fetched: bool = False,
    ) -> None:
        """Send pairs to their homes next to the training; see `LedgerAccess.record`."""
        self.ledger.record(columns, record, sums, observe, is_fetched)

    def wait(self) -> None:
        """Wait for the exchanges; see `LedgerAccess.wait`."""
        self.ledger.wait()

    def save(self, folder: str | os.PathLike[str], metadata: dict[str, object], is_first: bool) -> None:
        """Write the shard of each process; see `LedgerAccess.save`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.ledger.save(Path(folder, LEDGER_FILE), metadata)

    def join_saved(self, folder: str | os.PathLike[str]) -> None:
        """Join the shards on the first process, unless nodes without a common disk have them; see `LedgerAccess`."""
        self.ranks.wait()
        path = Path(folder, LEDGER_FILE)
        if self.ranks.own == 0 and not path.is_file():
            try:
                write_ledger(path, read_ledger(path))
            except (FileNotFoundError, ValueError) as error:
                logger.warning("The shards of the ledger stay as they are: %s", error)
        self.ranks.wait()


def make_access(
    num_samples: int | None, columns: tuple[str, ...], strategy: SelectionStrategy, ranks: Ranks, shards: bool
) -> LedgerAccess:
    """Build the ledger of a run, and the access of its steps.

    Args:
        num_samples: Number of pairs if ids are row numbers, None for arbitrary ids.
        columns: Names of the columns.
        strategy: Strategy of the run.
        ranks: Processes of the run.
        shards: True to split a ledger of arbitrary ids over several processes.

    Returns:
        Access to a `ShardedLedger`, or to a `SampleLedger` for row numbers, for one process, and for a strategy that
        has to see the pairs of all processes.
    """
    if num_samples is None and shards and not ranks.alone and dist.is_initialized():
        if records_each_pair_alone(strategy):
            return ShardAccess(ShardedLedger(ranks, columns), ranks)
        logger.info(
            "Each process holds the whole ledger, since the strategy %r looks at all pairs, or does not say that it "
            "records each pair alone (records_pairs_alone).",
            strategy.name,
        )
    return LedgerAccess(SampleLedger(num_samples, columns), ranks)
