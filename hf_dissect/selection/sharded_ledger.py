"""A ledger of arbitrary ids that is split over the processes of a run, each of which holds the pairs at home there."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_dissect.distributed import Ranks
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ordered_thread import OrderedThread
from hf_dissect.selection.saved_ledger import (
    SavedLedger,
    check_same_ids,
    join_shards,
    list_shards,
    name_shard,
    read_ledger,
    read_ledger_file,
    write_ledger,
)
from hf_dissect.selection.shard_group import UNUSABLE, Route, ShardGroup, as_bytes, find_homes

Record = Callable[[torch.Tensor, Mapping[str, torch.Tensor], SampleLedger], None]
"""Function that writes pairs to a ledger: their ids int64 `(n,)`, their columns `(n,)`, and the ledger."""


class ShardedLedger(SampleLedger):
    """Ledger whose pairs are split over the ranks by a hash of their ids, so that each holds its share of the memory.

    It replaces a `SampleLedger` of arbitrary ids, value for value:

    - In a step, `fetch` asks the homes of the step's pairs for their values, and `read` returns these. `record` sends
      what was measured to the homes, which write it. Both are exchanges of packets of one size, by a thread of their
      own while the model computes. The next `fetch`, or any access to the ledger, waits for them.
    - Between steps, `column`, `ids`, `len`, `find_known`, `read_anywhere`, `replace` and `load` serve what looks at
      all pairs, such as the labels of an epoch. Every rank calls them. Pairs come in the order of their ids, so that
      the results do not depend on the number of ranks. `write` keeps the own pairs of what every rank is given.
    - `save` writes the own shard.

    Args:
        ranks: Processes of the run.
        columns: Names of the columns.
        fewest_of_grid: See `ShardGroup`; None for its default.
    """

    def __init__(
        self, ranks: Ranks, columns: tuple[str, ...] = ("correlation",), fewest_of_grid: int | None = None
    ) -> None:
        self._shard = SampleLedger(None, columns)
        self.num_samples = None
        self.ranks = ranks
        self._group = ShardGroup(ranks.count, ranks.own, *(() if fewest_of_grid is None else (fewest_of_grid,)))
        self._thread = OrderedThread()
        self._fetched: Future | None = None
        self._table: dict[str, torch.Tensor] = {}
        self._way: tuple[Route, int | None] | None = None  # of the last fetch

    # ---- in a step ----

    def plan(self, sample_id: torch.Tensor) -> Route:
        """Return the way of pairs of this rank to their homes, from their ids int64 `(B,)`."""
        return Route(sample_id.detach().to("cpu", torch.int64).clone(), self.ranks.count)

    def fetch(self, route: Route, split: int | None = None) -> None:
        """Begin to read the values of pairs from their homes, which replace those of the last fetch.

        Args:
            route: Way of `B` pairs, see `plan`.
            split: Largest `Route.fullest` of all ranks; None to let the ranks talk about it first.
        """
        self._way = route, split if split is not None and split < UNUSABLE else None
        self._fetched = self._thread.submit(partial(self._ask, *self._way))

    def _ask(self, route: Route, split: int | None) -> dict[str, torch.Tensor]:
        split = self._group.agree_on_split(route) if split is None else split
        names, sample_id = list(self.columns), route.sample_id
        values = torch.zeros(0, len(names))
        if split:
            values = self._group.ask(route, split, lambda ids: self._shard.read_columns(names, ids))
        return {"sample_id": sample_id, **dict(zip(names, values.unbind(1), strict=True))}

    def share_fetched(self, sizes: Sequence[int]) -> None:
        """Exchange the fetched values, so that each rank reads those of all: `sizes` numbers of pairs of the ranks."""
        self._settle()
        self._table = self.ranks.gather_columns(self._table, sizes)

    def record(
        self,
        columns: Mapping[str, torch.Tensor],
        record: Record,
        sums: torch.Tensor | None = None,
        observe: Callable[[torch.Tensor], None] | None = None,
        is_fetched: bool = False,
    ) -> None:
        """Begin to send what was measured of pairs to their homes, which record it.

        Args:
            columns: Columns `(B,)` of pairs of this rank with `sample_id`, the same names and types on every rank.
            record: Function that writes pairs to the own shard: their ids, their columns and the shard.
            sums: Sums over the pairs of this rank, float64 `(m,)`; None for no exchange of sums.
            observe: Function that receives the sums over the pairs of all ranks.
            is_fetched: True on every rank if these are the pairs of the last `fetch`, in its order.
        """
        given = {name: column.detach().cpu().clone() for name, column in columns.items()}
        sample_id = given.pop("sample_id").to(torch.int64)
        way = self._way if is_fetched and self._way is not None else (self.plan(sample_id), None)
        self._thread.submit(partial(self._send, *way, given, record, sums, observe))

    def _send(
        self,
        route: Route,
        split: int | None,
        columns: dict[str, torch.Tensor],
        record: Record,
        sums: torch.Tensor | None,
        observe: Callable[[torch.Tensor], None] | None,
    ) -> None:
        split = self._group.agree_on_split(route) if split is None else split
        if split:
            arrived = self._group.send(route, split, columns)
            record(arrived.pop("sample_id"), arrived, self._shard)
        if sums is not None and observe is not None:
            observe(self._group.add_up(sums))

    def read(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the values of fetched pairs; see `SampleLedger.read`.

        Raises:
            ValueError: A pair was not fetched in this step.
        """
        self._settle()
        self._check_column(name)
        ids, table = sample_id.detach().to("cpu", torch.int64), self._table
        known = table.get("sample_id", torch.zeros(0, dtype=torch.int64))
        if name in table and torch.equal(ids, known):
            return table[name].clone()
        ordered, order = known.sort(stable=True)
        places = torch.searchsorted(ordered, ids.contiguous()).clamp_max(max(0, len(ordered) - 1))
        if name not in table or (len(ids) and (not len(ordered) or (ordered[places] != ids).any())):
            raise ValueError(
                f"The value {name!r} of pairs that are not of the current step is on other processes; read it by "
                "ledger.read_anywhere on every process at once, or set shard_ledger (selection.shard_ledger in a "
                "recipe) to false, with which each process holds the whole ledger."
            )
        return table[name][order[places]] if len(ids) else torch.zeros(0)

    def _settle(self) -> None:
        """Wait for the values of the last fetch."""
        if self._fetched is not None:
            fetched, self._fetched = self._fetched, None
            self._table = fetched.result()

    def wait(self) -> None:
        """Wait until what was begun is written, and raise an error that came meanwhile."""
        self._settle()
        self._thread.wait()

    # ---- between steps ----

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self._shard.columns

    @property
    def own(self) -> SampleLedger:
        """Ledger of the pairs that this process holds."""
        self.wait()
        return self._shard

    def is_own(self, sample_id: torch.Tensor) -> torch.Tensor:
        """Return a mask of the pairs that this process holds, bool `(B,)`."""
        return find_homes(sample_id.detach().to("cpu", torch.int64), self.ranks.count) == self.ranks.own

    def __bool__(self) -> bool:
        return True  # without asking the other processes for the number of pairs

    def __len__(self) -> int:
        """Return the number of pairs met so far on all ranks; every rank calls this."""
        return int(self._gather(torch.tensor([len(self.own)])).sum())

    @property
    def ids(self) -> torch.Tensor:
        """All ids, ascending, int64 `(len(self),)`; every rank asks for them."""
        return self._gather(self.own.ids).sort().values

    def column(self, name: str) -> torch.Tensor:
        """Return a whole column, float32 `(len(self),)`, in the order of the ids; every rank calls this method."""
        self._check_column(name)
        own = self.own
        return self._gather_values(own.ids, own.column(name))[1]

    def find_known(self, name: str, by: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and values of the pairs of all ranks with a value; see `SampleLedger.find_known`."""
        own = self.own
        (places,) = (~own.column(by or name).isnan()).nonzero(as_tuple=True)
        return self._gather_values(own.ids[places], own.column(name)[places])

    def read_anywhere(self, name: str, sample_id: torch.Tensor) -> torch.Tensor:
        """Return the values of any pairs, the same ones on every rank, `(B,)`; every rank calls this method."""
        self._check_column(name)
        sample_id = sample_id.detach().to("cpu", torch.int64)
        asked = torch.tensor([len(sample_id), int(sample_id.sum())])
        if (self._gather(asked[None]) != asked).any():
            raise ValueError("read_anywhere: the processes ask for different pairs; give each the same ones.")
        (places,) = self.is_own(sample_id).nonzero(as_tuple=True)
        columns = as_bytes([places, self.own.read(name, sample_id[places])])
        values = torch.full((len(sample_id),), torch.nan)
        gathered = self._gather(columns)
        values[_view(gathered[:, :8], torch.int64)] = _view(gathered[:, 8:], torch.float32)
        return values

    def write(self, name: str, sample_id: torch.Tensor, values: torch.Tensor) -> None:
        """Set the values of the own ones of pairs that every rank is given; see `SampleLedger.write`."""
        values = values.detach().cpu()
        if values.shape != sample_id.shape:
            raise ValueError(f"{len(values)} values for {len(sample_id)} sample ids; give one value per id.")
        sample_id = sample_id.detach().to("cpu", torch.int64)
        if len(sample_id) and sample_id.min() < 0:
            raise ValueError(f"sample_id {sample_id.min().item()} is negative; ids are non-negative integers.")
        mine = self.is_own(sample_id)
        self.own.write(name, sample_id[mine], values[mine])

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Replace a whole column, the same on every rank; see `SampleLedger.replace`."""
        ids = self.ids
        if values.shape != ids.shape:
            raise ValueError(f"{tuple(values.shape)} values for a column of {len(ids)} pairs; give one value a pair.")
        own = self.own
        own.replace(name, values[torch.searchsorted(ids, own.ids)])

    def replace_computed(self, name: str, compute: Callable[[SampleLedger], torch.Tensor]) -> None:
        """Replace a whole column by what is computed from the ledger; see `SampleLedger.replace_computed`."""
        self.replace(name, compute(self))

    def save(self, path: str | os.PathLike[str], metadata: dict[str, object] | None = None) -> None:
        """Write the own shard in the place of a whole ledger at `path`; every rank calls this method.

        Args:
            path: File of a whole ledger, such as `ledger.safetensors`; shards are `ledger-00000-of-00002.safetensors`.
            metadata: Data for JSON to save with the ledger.
        """
        shard = self.ranks.own, self.ranks.count
        write_ledger(Path(path), self.own.as_saved(metadata), shard)

    def load(self, path: str | os.PathLike[str]) -> dict[str, object]:
        """Replace the content by the own pairs of a saved ledger, of any number of shards; every rank calls this.

        Raises:
            FileNotFoundError: There is no ledger.
            ValueError: A file is missing or damaged on some rank, or belongs to other data.
        """
        self.wait()
        problem: Exception | None = None
        try:
            saved = self._read_own(Path(path))
        except (FileNotFoundError, ValueError) as error:
            problem = error
        # All processes end with the error of one, instead of waiting for it.
        for text in self.ranks.gather_objects(None if problem is None else str(problem)):
            if text is not None:
                raise problem if isinstance(problem, FileNotFoundError) else ValueError(text)
        self._shard.restore(saved)
        self._table = {}
        return saved.metadata

    def _read_own(self, path: Path) -> SavedLedger:
        own_shard = name_shard(path, self.ranks.own, self.ranks.count)
        if path.is_file():
            parts = [read_ledger(path)]
        elif own_shard.is_file():
            parts = [read_ledger_file(own_shard)]
        else:
            parts = [self._keep_own(read_ledger_file(file)) for file in list_shards(path)]
        if not parts:
            raise FileNotFoundError(f"No ledger at {path}.")
        check_same_ids(path, parts[0], None)
        saved = parts[0] if len(parts) == 1 else join_shards(parts, path)
        return self._keep_own(saved)

    def _keep_own(self, saved: SavedLedger) -> SavedLedger:
        return saved.subset(self.is_own(saved.ids))

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self._thread.submit(lambda: self._group.gather_rows(rows)).result()

    def _gather_values(self, ids: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = self._gather(as_bytes([ids, values]))
        ids, order = _view(gathered[:, :8], torch.int64).sort()
        return ids, _view(gathered[:, 8:], torch.float32)[order]

    def _check_column(self, name: str) -> Any:
        return self._shard._column(name)


def _view(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.contiguous().view(dtype).flatten()
