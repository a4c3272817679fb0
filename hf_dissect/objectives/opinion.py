"""Opinion of an objective about the pairs of a step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Opinion:
    """Opinion of an objective about the own `b` pairs of a step.

    Attributes:
        matched: Probability of each pair that its caption belongs to its image, `(b,)` in [0, 1], without gradient.
        weights: Weights of the pairs in the loss, `(b,)`, without gradient.
    """

    matched: torch.Tensor
    weights: torch.Tensor
