"""Posterior, weights and share of the noisy channel, against its formulas."""

import json
import math

import pytest
import torch

from hf_dissect.losses.noisy_channel import NoisyChannel, compute_bounded_loss, estimate_matches, find_evidence


def moved(channel: NoisyChannel, *posteriors: float) -> NoisyChannel:
    channel.observe(torch.tensor(posteriors))
    channel.begin_step()
    return channel


@pytest.mark.parametrize("count", [2, 37, 4096])
@pytest.mark.parametrize("pi", [0.05, 0.5, 0.93])
def test_the_posterior_is_that_of_a_pair_against_any_of_the_batch(pi, count):
    channel = NoisyChannel()
    channel.pi = pi
    q = torch.tensor([1.0, 0.9, 1 / count, 1e-3, 1e-12], dtype=torch.float64)
    expected = pi * q / (pi * q + (1 - pi) / count)
    posterior = channel.posterior(-q.log(), count)
    torch.testing.assert_close(posterior, expected)
    torch.testing.assert_close(channel.weigh(posterior), expected.square())
    counts = torch.tensor([count, 3, 5, 9, 2])
    torch.testing.assert_close(channel.posterior(-q.log(), counts), pi * q / (pi * q + (1 - pi) / counts))


def test_a_pair_as_likely_as_a_stranger_is_worth_the_share():
    channel = NoisyChannel()
    channel.pi = 0.3
    assert channel.posterior(torch.tensor([math.log(64)]), 64).item() == pytest.approx(0.3)
    assert channel.posterior(torch.zeros(1), 1).item() == pytest.approx(0.3)  # alone: nothing is known


@pytest.mark.parametrize("pi", [0.05, 0.5, 0.999])
def test_the_weighted_loss_has_the_gradient_of_the_bounded_one(pi):
    channel = NoisyChannel()
    channel.pi = pi
    losses = torch.linspace(0, 20, 30, dtype=torch.float64, requires_grad=True)
    for counts in (128, torch.arange(2, 32)):
        weights = channel.weigh(channel.posterior(losses, counts))
        assert not weights.requires_grad
        (weighted,) = torch.autograd.grad((weights * losses).sum(), losses)
        (bounded,) = torch.autograd.grad(compute_bounded_loss(losses, counts, pi).sum(), losses)
        torch.testing.assert_close(weighted, bounded)
        torch.testing.assert_close(weighted, weights)
    assert compute_bounded_loss(torch.tensor([1e4]), 128, pi).item() == pytest.approx(0, abs=1e-6)


def test_the_share_moves_once_a_step_by_all_that_was_observed():
    channel = NoisyChannel()
    channel.begin_step()
    assert channel.pi == 0.5
    channel.observe(torch.tensor([0.2, 0.4]))
    channel.observe(torch.tensor([0.9]))  # another micro-batch of the same step
    assert channel.pi == 0.5
    channel.begin_step()
    assert channel.pi == pytest.approx(0.98 * 0.5 + 0.02 * 0.5)
    channel.begin_step()
    assert channel.pi == pytest.approx(0.5)
    assert moved(channel, 1.0).pi == pytest.approx(0.51)
    assert channel.compute_figures() == {"estimated_mismatched": pytest.approx(0.49)}
    assert channel.pop_logs() == {"selection_estimated_mismatched": pytest.approx(0.49)}


@pytest.mark.parametrize(("seen", "end"), [(0.0, 0.05), (1.0, 0.999)])
def test_the_share_stays_within_its_bounds(seen, end):
    channel = NoisyChannel()
    for _ in range(600):
        moved(channel, seen)
    assert channel.pi == end


def test_a_saved_channel_continues_bit_for_bit():
    whole = moved(moved(NoisyChannel(), 0.1, 0.7), 0.3)
    whole.observe(torch.tensor([1 / 3, 1e-9]))
    resumed = NoisyChannel()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for channel in (whole, resumed):
        channel.observe(torch.tensor([0.123]))
        channel.begin_step()
    assert resumed.pi == whole.pi


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_losses_and_half_precision_stay_finite(dtype):
    losses = torch.tensor([0.0, 1e-8, 0.5, 11.0, 300.0, 6e4], dtype=dtype)
    channel = NoisyChannel()
    posterior = channel.posterior(losses, 512)
    assert posterior.dtype == torch.float32 and ((posterior >= 0) & (posterior <= 1)).all()
    evidence = find_evidence(losses, torch.tensor([512, 512, 512, 512, 512, 1]))
    assert evidence[:5].isfinite().all() and evidence[5].isnan() and (evidence[:5].diff() <= 0).all()


@pytest.mark.parametrize("mismatched", [0.1, 0.4, 0.7])
def test_the_share_of_the_largest_likelihood_is_that_of_the_evidence(mismatched):
    """Evidence from two normal densities, whose log ratio is known."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(20_000, generator=generator) >= mismatched
    place = torch.randn(20_000, generator=generator) + 3 * clean
    evidence = 3 * place - 4.5  # log N(place; 3, 1) - log N(place; 0, 1)
    evidence[7] = math.nan
    posterior, share = estimate_matches(evidence)
    assert share == pytest.approx(1 - mismatched, abs=0.015)
    assert posterior[7].isnan() and posterior.isnan().sum() == 1
    for low, high in ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)):
        part = (posterior > low) & (posterior < high)
        assert clean[part].float().mean().item() == pytest.approx(posterior[part].mean().item(), abs=0.08)
    assert estimate_matches(torch.full((3,), math.nan))[0].isnan().all()
