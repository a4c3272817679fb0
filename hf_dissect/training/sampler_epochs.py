"""Epochs of samplers that order pairs by themselves, also in the epoch in which a run resumes."""

from typing import Any

from torch.utils.data import DataLoader

from hf_dissect.data.balanced_order import BalancedSampler
from hf_dissect.selection.coreset import CoresetSampler


def follow_epochs(loader: DataLoader) -> DataLoader:
    """Return a loader whose own sampler learns of each epoch from transformers and accelerate.

    With several processes, a resumed run skips batches by one more wrapper around the batch sampler, which both
    libraries do not look through: the sampler would begin with the order of epoch 0.

    Args:
        loader: Loader of training pairs, as `Accelerator.prepare` returns it.
    """
    outer: Any = loader.batch_sampler
    inner = outer
    while hasattr(inner, "batch_sampler"):
        inner = inner.batch_sampler
    sampler = getattr(inner, "sampler", None)
    if isinstance(sampler, BalancedSampler | CoresetSampler):
        outer.set_epoch = sampler.set_epoch
    return loader
