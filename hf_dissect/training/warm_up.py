"""Warm-ups of a run and its length, and a warning if it ends before they do."""

import logging
import math
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def list_warm_ups(strategy: Any, objective: Any) -> dict[str, int]:
    """Return the number of epochs of each warm-up of a run, by what the steps of the warm-up do."""
    warmup_epochs: dict[str, int] = {strategy.warmup: getattr(strategy, "warmup_epochs", 0)}
    if objective.robust is not None:
        warmup_epochs[objective.robust.warmup] = objective.robust.warmup_epochs
    return warmup_epochs


def warn_if_warm_up_outlasts(pairs: Any, warmup_epochs: Mapping[str, int], args: Any) -> None:
    """Warn if `max_steps` ends a run before a warm-up ends.

    Args:
        pairs: Training pairs; a stream gives no warning, because the length of its epochs is unknown.
        warmup_epochs: Number of epochs of each warm-up, see `list_warm_ups`.
        args: Arguments of the run.
    """
    count = len(pairs) if hasattr(pairs, "__len__") else 0
    if args.max_steps <= 0 or not count:
        return
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    epochs = args.max_steps / math.ceil(count / batch)
    for deed, warmup in warmup_epochs.items():
        if 0 < warmup and epochs <= warmup:
            logger.warning(
                "max_steps=%d ends after %.1f epochs, before the warm-up of %d epochs does: all steps %s. "
                "Train longer, or warm up shorter.",
                *(args.max_steps, epochs, warmup, deed),
            )


def count_steps(num_pairs: int | None, args: Any) -> int:
    """Count the optimiser steps of a run.

    Args:
        num_pairs: Number of training pairs; None for a stream, whose length `max_steps` gives.
        args: Arguments of the run.
    """
    if args.max_steps > 0 or num_pairs is None:
        return args.max_steps
    batch = args.train_batch_size * args.world_size
    num_batches = num_pairs // batch if args.dataloader_drop_last else math.ceil(num_pairs / batch)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(num_batches / args.gradient_accumulation_steps)))
