"""The noisy channel ledger-first: fresh evidence lowers a planned weight, and the share is that of whole blocks."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.losses.pair_evidence import recover_losses
from hf_dissect.selection import CandidateScores, SampleLedger
from hf_dissect.selection.loaded_blocks import LoadedScores
from hf_dissect.selection.noisy_channel import NoisyChannelSampling


def test_fresh_evidence_may_lower_a_weight_but_not_raise_it():
    rule = NoisyChannelSampling()
    rule.channel.pi = 0.7
    planned = torch.tensor([0.9, 0.9, 0.1, torch.nan, 0.4])
    inclusion = torch.tensor([1.0, 0.5, 0.2, 0.4, 0.6])
    losses, n = torch.tensor([0.1, 5.0, 0.1, 2.0, 1.0]), 64
    q = torch.exp(-losses.double())
    posterior = 0.7 * q / (0.7 * q + 0.3 / n)
    wanted = torch.fmin(posterior**2, planned.double()) / inclusion  # an unknown pair has its new weight
    weights = rule.reweigh(planned, inclusion)(losses, torch.full((5,), float(n)))
    torch.testing.assert_close(weights.double(), wanted / wanted.mean(), atol=1e-5, rtol=1e-5)
    assert weights[2] == pytest.approx(float(0.1 / 0.2 / wanted.mean()), rel=1e-5)
    nothing = rule.reweigh(torch.zeros(2), torch.ones(2))(torch.ones(2), torch.full((2,), 8.0))
    assert nothing.tolist() == [0, 0]


def test_the_share_moves_by_the_newest_evidence_of_whole_blocks():
    rule, ledger = NoisyChannelSampling(), SampleLedger(6, columns=("correlation", "evidence"))
    rule.channel.pi = 0.6
    evidence = torch.tensor([3.0, -2.0, 0.5, torch.nan, 8.0])
    ledger.write("evidence", torch.arange(5), evidence)
    planned = rule.plan(ledger)
    matched = [1 / (1 + math.exp(-value) * 0.4 / 0.6) for value in (3.0, -2.0, 0.5, 8.0)]
    assert planned[[0, 1, 2, 4]].tolist() == pytest.approx([p**2 for p in matched], rel=1e-4)
    assert planned[[3, 5]].isnan().all()
    rule.record(torch.arange(2), torch.zeros(2), ledger, {"evidence": evidence[:2]})  # two that were loaded
    rule.observe(rule.summarize_block(torch.arange(6), ledger))
    rule.begin_step()
    assert rule.channel.pi == pytest.approx(0.98 * 0.6 + 0.02 * sum(matched) / 4, rel=1e-6)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_evidence_of_loaded_pairs_has_the_temperature_of_the_channel(tau, held):
    images, texts = F.normalize(torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    others = CandidateScores(torch.arange(6, 9), images[6:], texts[6:]) if held else None
    scores, tempered = (
        LoadedScores(
            torch.arange(9), (images[:6], texts[:6]), others, (torch.tensor(scale), torch.tensor(0.0)), "softmax"
        )
        for scale in (40.0, 40.0 * tau)
    )
    rule, ledger = NoisyChannelSampling(), SampleLedger(9, columns=("correlation", "evidence"))
    rule.channel.temperature.value = tau
    measured = rule.measure(scores, ledger)
    torch.testing.assert_close(measured["evidence"], tempered.evidence, rtol=1e-3, atol=1e-3)
    expected = recover_losses(tempered.evidence, scores.num_candidates)
    torch.testing.assert_close(scores.temper_softmax_loss(tau), expected, rtol=1e-4, atol=1e-5)
