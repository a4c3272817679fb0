"""Opinion about the pairs of a step, which of them belong together."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Opinion:
    """Opinion of an objective or a strategy about the own `b` pairs of a step.

    Attributes:
        matched: Probability of each pair that its caption belongs to its image, `(b,)` in [0, 1], without gradient.
        weights: Weights of the pairs in the loss, `(b,)`, without gradient.
        factors: Factors of weights and doubts alike, such as the inverse probability with which a pair was drawn,
            `(b,)`; None for 1.
    """

    matched: torch.Tensor
    weights: torch.Tensor
    factors: torch.Tensor | None = None
