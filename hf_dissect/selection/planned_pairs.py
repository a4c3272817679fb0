"""Map-style pairs of which a plan decides, block by block, which are loaded at all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_dissect.data.arrow_columns import read_chunked_column
from hf_dissect.data.pairs import PairDataset
from hf_dissect.selection.block_choice import BlockRule, LoadedRows
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_plan import PLAN_COLUMN


class PlannedPairs(torch.utils.data.Dataset):
    """Pairs that load only those of a block which the plan of the epoch chose.

    A data loader asks for a block of indices at a time, which its sampler, its shards over processes and its skipping
    have made as always. Rows that the plan leaves out are neither read, decoded nor tokenised. The plan is in shared
    memory, 4 bytes a pair, so that workers that live longer than an epoch read the current one.

    Args:
        pairs: Map-style pairs with known ids, see `find_sample_ids`.
        rule: Rule of the choice in a block.
        ledger: Ledger of the run, with the column `planned`.
    """

    def __init__(self, pairs: Any, rule: BlockRule, ledger: SampleLedger) -> None:
        self.pairs = pairs
        self.rule = rule
        self.sample_ids = find_sample_ids(pairs)
        self._truths = read_truths(pairs)
        self._epoch = torch.full((1,), -1).share_memory_()
        if ledger.num_samples is not None and self.sample_ids is None:
            self._planned = ledger.column(PLAN_COLUMN)  # in shared memory already
        else:
            self._planned = torch.full((len(pairs),), torch.nan).share_memory_()

    lag = 0

    def position(self) -> int:
        """Return 0: a plan holds for a whole epoch, whose batches are read from its beginning on."""
        return 0

    def publish(self, epoch: int | None, ledger: SampleLedger, begun: Sequence[int | None]) -> None:
        """Follow the plan in the ledger from now on.

        Args:
            epoch: Epoch, from 0; None to load all pairs.
            ledger: Ledger with the plan in the column `planned`.
            begun: Without effect here.
        """
        self._epoch.fill_(-1 if epoch is None else epoch)
        if epoch is not None and self.sample_ids is not None:
            self._planned.copy_(ledger.read_anywhere(PLAN_COLUMN, torch.as_tensor(self.sample_ids)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the rows of a block that the plan chose as `LoadedRows`, or all rows before there is a plan."""
        epoch = int(self._epoch)
        if epoch < 0:
            return self._read(list(indices))
        places = torch.as_tensor(indices)
        ids = places if self.sample_ids is None else torch.as_tensor(self.sample_ids[places.numpy()])
        loaded = self.rule.choose(ids, self._planned[places], epoch)
        if self._truths is not None:
            is_left = torch.ones(len(places), dtype=torch.bool).index_fill(0, loaded.rows, False)
            loaded = replace(loaded, unloaded=loaded.unloaded | {"unloaded_clean": self._truths[places[is_left]]})
        return LoadedRows(self._read(places[loaded.rows].tolist()), loaded)

    def _read(self, indices: list[int]) -> list[Any]:
        if hasattr(self.pairs, "__getitems__"):
            return self.pairs.__getitems__(indices)
        return [self.pairs[index] for index in indices]


def find_sample_ids(pairs: Any) -> np.ndarray | None:
    """Return the ids of pairs by index, int64 `(n,)`, before any is loaded; None if they are the indices.

    Raises:
        ValueError: The data set does not know its ids beforehand.
    """
    if isinstance(pairs, PairDataset):
        return None if pairs.sample_ids is None else np.asarray(pairs.sample_ids, dtype=np.int64)
    ids = getattr(pairs, "sample_ids", None)
    if ids is None or len(ids) != len(pairs):
        raise ValueError(
            f"selection_rescore_every: {type(pairs).__name__} does not know the ids of its pairs before it loads "
            "them, so that no plan can leave pairs out; give it an attribute sample_ids, the ids in the order of the "
            "rows, or set selection_rescore_every (selection.rescore_every in a recipe) to 1."
        )
    return np.asarray(ids, dtype=np.int64)


def read_truths(pairs: Any) -> torch.Tensor | None:
    """Return the truth of each pair, bool `(n,)`, without loading pairs; None if it is unknown."""
    if not isinstance(pairs, PairDataset) or pairs.columns.clean is None:
        return None
    values = read_chunked_column(pairs.rows, pairs.columns.clean).to_pylist()
    places = zip(pairs.row_of_pair.tolist(), pairs.place_of_pair.tolist(), strict=True)
    return torch.tensor([bool(_pick(values[row], place)) for row, place in places])


def _pick(value: Any, place: int) -> Any:
    if isinstance(value, list):
        return value[place] if place < len(value) else False
    return value
