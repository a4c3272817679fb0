"""Online selection by DivBS: a subset whose directions stand for the whole batch, without saying anything twice."""

import torch

from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy

_SMALLEST = 1e-4
"""Squared length of what is new in a candidate, of a vector of length 1, below which it is rounding."""


class DivBS(SelectionStrategy):
    """Diversified batch selection (DivBS, ICML 2024, arXiv 2406.04872).

    The representativeness of a subset is the sum, over an orthonormal basis of the span of its features, of the
    products of each basis vector with the sum of the features of the whole batch. It is maximised greedily: the next
    candidate is the one whose feature, after the projection on those of the chosen candidates is removed and the rest
    is scaled to unit length, has the largest absolute product with that sum.

    The feature of a pair is its image embedding followed by its text embedding, where the paper also takes gradients
    of the last layer. Once the chosen candidates span all features, as they do after `2 D` of them, the search begins
    again among the rest; the paper's code takes random ones then. The rule uses no history.
    """

    name = "divbs"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` most representative candidates; see `SelectionStrategy.select`."""
        return Selection(choose_diverse(torch.cat(scores.get_embeds(), dim=1), k).cpu().sort().values)


@torch.no_grad()
def choose_diverse(features: torch.Tensor, k: int) -> torch.Tensor:
    """Choose `k` of `B` candidates by greedy orthogonalised representativeness, in `O(B k D)`.

    Args:
        features: Features of the candidates `(B, D)`, none of length 0.
        k: Number of candidates to choose, `1 <= k <= B`.

    Returns:
        Positions of the candidates, int64 `(k,)`, in the order of the choice.
    """
    # The new part of a candidate is a small difference of large numbers once many are chosen.
    precision = torch.float32 if features.device.type == "mps" else torch.float64
    features = torch.nn.functional.normalize(features.to(precision), dim=1)
    total = features.sum(0)
    is_left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[torch.Tensor] = []
    while len(chosen) < k:
        basis = features.new_zeros(min(features.shape[1], k - len(chosen)), features.shape[1])
        # Of each feature, the part that is orthogonal to the basis: its squared length, and its product with `total`.
        squared, product = features.new_ones(len(features)), features @ total
        for size in range(len(basis)):
            gain = torch.where(squared > _SMALLEST, product.abs() * squared.clamp_min(_SMALLEST).rsqrt(), -1.0)
            best = gain.masked_fill(~is_left, -2.0).argmax()
            if size and squared[best] <= _SMALLEST:
                break  # all that is left lies in the span of the basis
            direction = features[best]
            for _ in range(2):  # once more, as the first projection leaves a rest of rounding errors
                direction = direction - basis[:size].T @ (basis[:size] @ direction)
            basis[size] = direction / direction.norm().clamp_min(_SMALLEST)
            share = features @ basis[size]
            squared, product = squared - share.square(), product - share * (basis[size] @ total)
            is_left[best] = False
            chosen.append(best)
    return torch.stack(chosen)
