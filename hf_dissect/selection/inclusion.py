"""Sampling of a fixed number of pairs with inclusion probabilities in proportion to their weights."""

import torch


def find_inclusion(weights: torch.Tensor, k: int) -> torch.Tensor:
    """Find the inclusion probabilities `min(1, c * weight)` that sum to `k`.

    If fewer than `k` pairs have a weight above 0, all of these are included, and the others share what is left of `k`
    equally.

    Args:
        weights: Weights `(n,)`, finite and at least 0.
        k: Number of pairs to draw, `0 <= k <= n`.

    Returns:
        Inclusion probabilities, float64 `(n,)`.

    Raises:
        ValueError: A weight is negative or not finite, or `k` is out of its range.
    """
    weights = weights.detach().double()
    if not (weights.isfinite() & (weights >= 0)).all():
        bad = weights[~(weights.isfinite() & (weights >= 0))][0].item()
        raise ValueError(f"weights: one is {bad}; all must be finite and at least 0.")
    if not 0 <= k <= len(weights):
        raise ValueError(f"k={k}: must be from 0 to the number of pairs, {len(weights)}.")
    if k == 0:
        return torch.zeros_like(weights)
    weights = weights / weights.max().clamp_min(torch.finfo(torch.float64).tiny)
    has_weight = weights > 0
    num_weighted = int(has_weight.sum())
    if num_weighted <= k:
        rest = (k - num_weighted) / max(1, len(weights) - num_weighted)
        return torch.where(has_weight, 1.0, rest)
    largest = weights.sort(descending=True).values
    tails = largest.flip(0).cumsum(0).flip(0)  # the small ones first, so that none is lost
    numbers = torch.arange(k, dtype=torch.float64, device=weights.device)
    # The certain pairs end before the first one that gets at most 1 of what is left.
    num_certain = int(((k - numbers) * largest[:k] <= tails[:k]).nonzero()[0])
    return ((k - num_certain) * (weights / tails[num_certain])).clamp_max(1)


def sample_systematically(inclusion: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw pairs without replacement by systematic sampling in random order.

    The pairs lie side by side in random order, each as wide as its inclusion probability. Those under the points
    `u, u + 1, ...` with a uniform `u` in [0, 1) are drawn, so that each has exactly its inclusion probability.

    Args:
        inclusion: Inclusion probabilities `(n,)` in [0, 1] with a whole number `k` as their sum, see `find_inclusion`.
        generator: Source of the random numbers, on the CPU; None for the default one.

    Returns:
        Positions of exactly `k` pairs, int64 `(k,)`, ascending, on the CPU.
    """
    inclusion = inclusion.detach().cpu().double()
    k = round(inclusion.sum().item())
    order = torch.randperm(len(inclusion), generator=generator)
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    ends = inclusion[order].cumsum(0)
    places = torch.searchsorted(ends, start + torch.arange(k), right=True)
    drawn = order[places[places < len(order)]].unique()
    if len(drawn) < k:  # rounding errors of the sums: a point beyond the end, or two in a pair of probability 1
        left = inclusion.index_fill(0, drawn, -1)
        drawn = torch.cat([drawn, left.topk(k - len(drawn)).indices]).sort().values
    return drawn
