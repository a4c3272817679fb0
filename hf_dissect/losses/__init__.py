"""The objectives of dual encoders, over the pairs of all ranks."""

from hf_dissect.losses.contrastive import ContrastiveLoss, per_pair_loss
from hf_dissect.losses.grad_cache import grad_cached_backward
from hf_dissect.losses.gsc import GscLoss, gsc_evidence

__all__ = ["ContrastiveLoss", "GscLoss", "grad_cached_backward", "gsc_evidence", "per_pair_loss"]
