"""Loading of what a plan chooses, of stored pairs as of a stream."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_dissect.data.pairs import PairStream
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.selection.block_choice import LoadedRows
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.ledger_plan import LedgerPlan
from hf_dissect.selection.planned_pairs import PlannedPairs, find_sample_ids
from hf_dissect.selection.planned_stream import StreamPlanFiles


class BlockCollator:
    """Collator that adds to a batch of `LoadedRows` which pairs of the block were loaded, and why.

    Args:
        collator: Collator of the rows; the batch of any other rows is unchanged.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """Collate `n` rows; add `inclusion` and `planned` `(n,)`, and `Loaded.unloaded` `(B - n,)` each."""
        batch = self.collator(rows)
        if not isinstance(rows, LoadedRows):
            return batch
        loaded = rows.loaded
        return {**batch, "inclusion": loaded.inclusion, "planned": loaded.planned, **loaded.unloaded}


def load_by_plan(plan: LedgerPlan | None, data: Any, ledger: SampleLedger) -> Any:
    """Return data of which the plan decides what is loaded; the data themselves without a plan.

    Args:
        plan: Plan of the run; None to load all candidates.
        data: Map-style pairs, which are wrapped, or the loader of a stream, which is set up to follow the plan.
        ledger: Ledger of the run.
    """
    if plan is None:
        return data
    if not isinstance(data, StreamLoader):
        plan.reader = pairs = PlannedPairs(data, plan.rule, ledger)
        return pairs
    ahead = data.num_workers * (data.prefetch_factor or 2)
    plan.reader = files = StreamPlanFiles(ahead, lambda: data.num_batches)
    data.pick, data.collator = files.picker(plan.rule), BlockCollator(data.collator)
    return data


def collate_blocks(loader: DataLoader) -> DataLoader:
    """Return a loader of map-style pairs whose batches say what the plan loaded, whatever its collator."""
    base: Any = getattr(loader, "base_dataloader", loader)  # accelerate wraps the loader that has workers
    base.collate_fn = BlockCollator(base.collate_fn)
    return loader


def check_loading(pairs: Any) -> None:
    """Check that training pairs can be left out before they are loaded.

    Args:
        pairs: Training pairs, or None.

    Raises:
        ValueError: Their ids are not known before they are loaded.
    """
    if pairs is None or isinstance(pairs, PairStream):
        return
    if not hasattr(pairs, "__getitem__"):
        raise ValueError(
            f"selection_rescore_every: a {type(pairs).__name__} yields pairs that are loaded already; stream "
            "them from a datasets.IterableDataset, or set selection_rescore_every (selection.rescore_every in a "
            "recipe) to 1."
        )
    find_sample_ids(pairs)
