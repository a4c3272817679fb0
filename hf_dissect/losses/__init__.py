"""The objectives of dual encoders, over the pairs of all ranks."""

from hf_dissect.losses.contrastive import ContrastiveLoss, per_pair_loss
from hf_dissect.losses.grad_cache import grad_cached_backward

__all__ = ["ContrastiveLoss", "grad_cached_backward", "per_pair_loss"]
