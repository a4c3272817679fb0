"""Loaders of candidate batches, of which a plan, a coreset or a balance may leave pairs out."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hf_dissect.data.pair_weights import collate_weighted
from hf_dissect.data.pairs import PairStream
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.selection import OnlineSelector
from hf_dissect.selection.planned_loading import collate_blocks, load_by_plan
from hf_dissect.training.balanced_pairs import choose_sampler
from hf_dissect.training.reference_pass import plan_loading
from hf_dissect.training.resolution import Resolution
from hf_dissect.training.sampler_epochs import follow_epochs


def make_pair_loader(
    selector: OnlineSelector,
    resolution: Resolution,
    pairs: Any,
    args: Any,
    make_loader: Callable[..., Any],
    batch_size: int,
    sampler_of: Any,
) -> Any:
    """Build the loader of candidate batches of stored pairs, of which a plan or a coreset may leave pairs out.

    Args:
        selector: Selector of the run.
        resolution: Sizes of the pictures.
        pairs: Training pairs.
        args: Arguments of the run.
        make_loader: Function of the Trainer that builds a loader.
        batch_size: Number of candidates of a step.
        sampler_of: Function from a data set to the sampler of the Trainer.
    """
    loading = plan_loading(selector, pairs, batch_size, choose_sampler(pairs, args, sampler_of))
    planned = load_by_plan(selector.plan, pairs, selector.ledger)
    loader = follow_epochs(make_loader(planned, "Training", *loading, is_training=True))
    return resolution.size_batches(loader if planned is pairs else collate_blocks(loader))


def make_stream_loader(selector: OnlineSelector, resolution: Resolution, pairs: PairStream, args: Any) -> StreamLoader:
    """Build the loader of candidate batches of a stream for this process, of which a plan may leave pairs out."""
    collator, has_weights = resolution.collator, pairs.columns.weight is not None
    loader = StreamLoader(
        pairs,
        partial(collate_weighted, collator=collator) if has_weights else collator,
        args.train_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        num_workers=args.dataloader_num_workers,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_buffer=args.shuffle_buffer,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    return resolution.size_batches(load_by_plan(selector.plan, loader, selector.ledger))
