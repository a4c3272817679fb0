"""Estimators of information, against distributions whose information has a formula."""

import math

import pytest
import torch

from hf_dissect.distillation.information import (
    FEWEST_ROWS,
    bound_information,
    compute_entropy,
    estimate_cross_entropy,
    estimate_information,
)


def correlated(count: int, size: int, correlation: float, seed: int = 0, hidden: int = 0):
    """Gaussians of `size` correlated pairs of dimensions, turned by a rotation, with `hidden` dimensions of noise."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size + hidden, size + hidden, generator=torch.Generator().manual_seed(9)))[0]
    x, noise = torch.randn(2, count, size + hidden, generator=generator)
    y = torch.cat([x[:, :size] * correlation + noise[:, :size] * math.sqrt(1 - correlation**2), noise[:, size:]], 1)
    return x @ turn, y @ turn.T * 3 + 5


def halves(x, y, train):
    return x[:train], y[:train], x[train:], y[train:]


@pytest.mark.parametrize("size, correlation, hidden", [(4, 0.8, 0), (8, 0.6, 24), (2, 0.0, 30)])
def test_both_estimates_come_near_the_information_of_gaussians(size, correlation, hidden):
    true = -size / 2 * math.log(1 - correlation**2)
    parts = halves(*correlated(1500, size, correlation, hidden=hidden), 1000)
    bound, estimate = bound_information(*parts), estimate_information(*parts)
    assert bound.cap == pytest.approx(math.log(500))
    assert 0.75 * true - 0.05 < estimate < 1.1 * true + 0.05
    assert 0.45 * true - 0.05 < bound.nats < true + 0.1


def test_one_estimate_exceeds_the_logarithm_of_the_rows():
    true = -16 / 2 * math.log(1 - 0.95**2)  # 18.6 nats
    parts = halves(*correlated(400, 16, 0.95, hidden=16), 300)
    bound, estimate = bound_information(*parts), estimate_information(*parts)
    assert bound.nats <= bound.cap == pytest.approx(math.log(100))
    assert math.log(100) < estimate < true * 1.1 and estimate > 0.6 * true


@pytest.mark.parametrize("classes", [8, 24])
def test_features_that_share_a_class_alone_are_worth_no_more_than_the_class(classes):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (900,), generator=generator)
    centres = 4 * torch.randn(2, classes, 64, generator=generator)
    x, y = centres[:, label] + torch.randn(2, 900, 64, generator=generator)
    parts = halves(x, y, 600)
    true = math.log(classes)
    assert bound_information(*parts).nats == pytest.approx(true, rel=0.15)
    assert 0.4 * true < estimate_information(*parts) < true + 0.15


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.75])
def test_heads_find_the_information_of_a_channel(wrong):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(4, (3000,), generator=generator)
    other = (label + torch.randint(1, 4, (3000,), generator=generator)) % 4
    received = torch.where(torch.rand(3000, generator=generator) < wrong, other, label)
    features = torch.nn.functional.one_hot(received, 4).float() @ torch.randn(4, 12, generator=generator)
    parts = [(wrong / 3, 3), (1 - wrong, 1)]
    true = -sum(number * share * math.log(share) for share, number in parts if share)  # H(Y|X); at 0.75, log 4
    found = estimate_cross_entropy(features[:1500], label[:1500], features[1500:], label[1500:])
    assert found == pytest.approx(true, abs=0.03)
    assert compute_entropy(label) == pytest.approx(math.log(4), abs=0.01)


def test_a_head_on_features_learnt_by_heart_is_not_worse_than_the_frequencies():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(5, (300,), generator=generator)
    own = torch.nn.functional.one_hot(label, 5).float() * 10 + torch.randn(300, 5, generator=generator)
    held_out, true = 10 * torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator)
    assert estimate_cross_entropy(own, label, held_out, true) < math.log(5) + 0.1


def test_one_class_in_two_needs_no_more_than_a_bit():
    label = torch.arange(200) % 2
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 3 * label[:, None]
    found = estimate_cross_entropy(features[:100], label[:100], features[100:], label[100:])
    assert 0 <= found < 0.1


def test_too_few_rows_are_not_known():
    few, many = torch.randn(FEWEST_ROWS - 1, 3), torch.randn(40, 3)
    label = torch.arange(40) % 2
    for own, held_out in ((few, many), (many, few)):
        assert bound_information(own, own, held_out, held_out) is None
        assert estimate_information(own, own, held_out, held_out) is None
        assert estimate_cross_entropy(own, label[: len(own)], held_out, label[: len(held_out)]) is None
    assert estimate_cross_entropy(many, label * 0, many, label * 0) is None
    assert compute_entropy(label[:0]) is None


def test_features_without_variation_tell_nothing_and_break_nothing():
    point, varied = torch.full((60, 4), 0.3), torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    label = torch.arange(60) % 3
    assert estimate_information(point, varied, point, varied) == pytest.approx(0.0, abs=1e-6)
    assert bound_information(point, varied, point, varied).nats == pytest.approx(0.0, abs=1e-3)
    assert estimate_cross_entropy(point, label, point, label) == pytest.approx(math.log(3), abs=0.1)


def test_the_random_state_stays():
    before, x = torch.random.get_rng_state(), torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bound_information(x, x, x, x)
    estimate_information(x, x, x, x)
    estimate_cross_entropy(x, torch.arange(40) % 2, x, torch.arange(40) % 2)
    assert torch.equal(torch.random.get_rng_state(), before)
