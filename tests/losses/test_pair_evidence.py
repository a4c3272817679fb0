"""Evidence about pairs that is comparable between batches of different sizes."""

import math

import pytest
import torch

from hf_dissect.losses.pair_evidence import compute_pair_evidence, recover_losses


def test_evidence_is_the_log_odds_against_one_stranger():
    similarity, strangers = 3.0, [0.5] * 7
    q = math.exp(similarity) / (math.exp(similarity) + sum(map(math.exp, strangers)))
    evidence = compute_pair_evidence(torch.tensor([-math.log(q)], dtype=torch.float64), 8)
    assert evidence.item() == pytest.approx(similarity - 0.5)


def test_a_loss_can_be_carried_to_a_batch_of_another_size():
    losses = torch.tensor([1e-4, 0.3, 2.0, 6.2, 30.0], dtype=torch.float64)
    counts = torch.tensor([512, 512, 256, 2, 512])
    evidence = compute_pair_evidence(losses, counts)
    torch.testing.assert_close(recover_losses(evidence, counts), losses)
    among_64 = recover_losses(evidence, 64)
    odds = (counts - 1) * torch.exp(-losses) / (1 - torch.exp(-losses))
    torch.testing.assert_close(among_64, -torch.log(odds / (odds + 63)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evidence_is_finite_for_any_loss(dtype):
    evidence = compute_pair_evidence(torch.tensor([0.0, 1e-12, 1.0, 500.0], dtype=dtype), 512)
    assert evidence.isfinite().all() and (evidence.diff()[1:] < 0).all()
