"""The objectives of dual encoders, over the pairs of all ranks."""

from hf_dissect.losses.contrastive import ContrastiveLoss, per_pair_loss

__all__ = ["ContrastiveLoss", "per_pair_loss"]
