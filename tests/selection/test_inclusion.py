import math

import pytest
import torch

from hf_dissect.selection.inclusion import find_inclusion, sample_systematically


def written_out(weights: list[float], k: int) -> list[float]:
    """Find `c` by bisection, as its definition has it."""
    low, high = 0.0, k / min(weight for weight in weights if weight > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1, middle * weight) for weight in weights) < k else (low, middle)
    return [min(1, high * weight) for weight in weights]


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 1.0, 1.0, 1.0],
        [0.9, 0.1, 0.05, 0.4, 0.4, 0.9, 0.01],
        [100.0, 1e-3, 2e-3, 1e-3, 50.0],
        [1e-30, 3e-30, 2e-30, 1e-31],
        [1e-40, 1.0, 1e-12, 1e-20],
        [0.0, 0.5, 0.2, 0.0, 0.9],
    ],
)
def test_the_inclusion_is_proportional_up_to_1_and_sums_to_k(weights):
    for k in range(1, sum(weight > 0 for weight in weights)):
        inclusion = find_inclusion(torch.tensor(weights, dtype=torch.float64), k)
        assert inclusion.sum().item() == pytest.approx(k, rel=1e-12)
        assert inclusion.tolist() == pytest.approx(written_out(weights, k), rel=1e-6)


def test_without_enough_weights_the_others_share_what_is_left():
    assert find_inclusion(torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0]), 3).tolist() == [0.5, 1, 0.5, 0.5, 0.5]
    assert find_inclusion(torch.zeros(4), 1).tolist() == [0.25] * 4
    assert find_inclusion(torch.zeros(4), 4).tolist() == find_inclusion(torch.rand(4), 4).tolist() == [1] * 4
    assert find_inclusion(torch.rand(3), 0).tolist() == [0] * 3 and not len(find_inclusion(torch.zeros(0), 0))


@pytest.mark.parametrize(("weights", "said"), [([1, math.nan], "nan"), ([-0.5, 1], "-0.5"), ([math.inf, 1], "inf")])
def test_weights_that_are_no_weights_are_refused(weights, said):
    with pytest.raises(ValueError, match=f"one is {said}; all must be finite"):
        find_inclusion(torch.tensor(weights), 1)
    with pytest.raises(ValueError, match="k=3: must be from 0 to the number of pairs, 2"):
        find_inclusion(torch.ones(2), 3)


def test_each_pair_is_drawn_as_often_as_its_inclusion_says():
    weights = torch.tensor([0.9, 0.5, 0.0, 0.05, 0.3, 1.0, 0.01, 0.2])
    inclusion, generator = find_inclusion(weights, 4), torch.Generator().manual_seed(0)
    draws = 10_000
    counts = torch.zeros(len(weights), dtype=torch.float64)
    for _ in range(draws):
        drawn = sample_systematically(inclusion, generator)
        assert len(drawn) == 4 and (drawn.diff() > 0).all()
        counts[drawn] += 1
    deviation = (inclusion * (1 - inclusion) / draws).sqrt()
    assert ((counts / draws - inclusion).abs() <= 4.5 * deviation).all()
    assert counts[2] == 0 and counts[5] == draws


@pytest.mark.parametrize("power", [1, 8, 40])
def test_weights_by_inclusion_give_the_full_weighted_sum_on_average(power):
    generator = torch.Generator().manual_seed(power)
    weights = torch.rand(60, generator=generator, dtype=torch.float64) ** power
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    inclusion = find_inclusion(weights, 20)
    sums = []
    for _ in range(4_000):
        drawn = sample_systematically(inclusion, generator)
        sums.append((weights[drawn] / inclusion[drawn] * values[drawn]).sum())
    sums = torch.stack(sums)
    assert (sums.mean() - (weights * values).sum()).abs() <= 4.5 * sums.std() / len(sums) ** 0.5 + 1e-12


@pytest.mark.parametrize("size", [1, 7, 4_096, 300_000])
def test_exactly_k_different_pairs_are_drawn_at_any_size(size):
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(size, generator=generator) ** 30 * (torch.rand(size, generator=generator) < 0.5)
    for k in {0, 1, size // 3, size - 1, size}:
        inclusion = find_inclusion(weights, k)
        drawn = sample_systematically(inclusion, generator)
        assert len(drawn) == k and (k == 0 or len(drawn.unique()) == k)
        assert (inclusion[drawn] > 0).all()


def test_the_same_generator_draws_the_same_pairs():
    inclusion = find_inclusion(torch.rand(50), 10)
    first, second, other = (sample_systematically(inclusion, torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert first.equal(second) and not first.equal(other)
