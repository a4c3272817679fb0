import logging

import numpy as np
import pytest
import torch
from testing import written_out_gsc
from testing.made_tensors import MadeTensors

from hf_dissect.losses import ContrastiveLoss, GscLoss, gsc_evidence

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}
BLOCKS = {"one block": 2**24, "uneven blocks": 23, "row by row": 1}


def as_tensors(arrays, dtype=torch.float64) -> list[torch.Tensor]:
    images, texts, labels = (torch.tensor(array, dtype=dtype) for array in arrays)
    return [images.requires_grad_(), texts.requires_grad_(), labels]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.parametrize(("gamma", "temperature"), [(0.01, 0.07), (0.8, 0.5), (0.0, 0.2)])
def test_loss_and_gradients_are_those_of_the_formulas(gamma, temperature, block, dtype):
    arrays = written_out_gsc.pairs(7, 4)
    images, texts, labels = as_tensors(arrays, dtype)
    loss = GscLoss(gamma, temperature, BLOCKS[block])(images, texts, labels)
    (loss * 3).backward()
    assert loss.dtype == dtype
    expected = written_out_gsc.loss(*arrays, gamma, temperature)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCES[dtype], abs=TOLERANCES[dtype])
    for side, gradient in zip((images, texts), written_out_gsc.gradients(*arrays, gamma, temperature), strict=True):
        # Central differences are exact to about 1e-9.
        assert np.allclose(side.grad.numpy(), 3 * gradient, rtol=1e-6, atol={torch.float64: 1e-8}.get(dtype, 1e-6))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_evidence_is_that_of_the_formulas(dtype):
    arrays = written_out_gsc.pairs(9, 4, seed=1)
    images, texts, labels = as_tensors(arrays, dtype)
    mask = arrays[2]
    expected = written_out_gsc.evidence(*arrays[:2], mask, 0.2)
    alone = gsc_evidence(images, texts, labels, temperature=0.2)
    loss, beside = GscLoss(temperature=0.2).with_evidence(images, texts, labels)
    assert loss.item() == pytest.approx(written_out_gsc.loss(*arrays, 0.01, 0.2), rel=TOLERANCES[dtype])
    loss.backward()
    assert np.allclose(images.grad, written_out_gsc.gradients(*arrays, 0.01, 0.2)[0], atol=1e-6)
    for found in (alone, beside):
        assert list(found) == ["agreement", "structure"]
        for name, values in found.items():
            assert not values.requires_grad and values.dtype == dtype
            assert np.allclose(values.numpy(), expected[name], rtol=0, atol=TOLERANCES[dtype]), name


def test_with_labels_of_one_and_no_gamma_it_is_the_contrastive_loss():
    images, texts, labels = as_tensors(written_out_gsc.pairs(6, 4))
    embeds = {"image_embeds": images, "text_embeds": texts}
    contrastive = ContrastiveLoss()(embeds, scale=torch.tensor(1 / 0.07, dtype=torch.float64))
    assert torch.allclose(GscLoss(gamma=0)(images, texts, torch.ones(6)), contrastive, rtol=1e-12)


def test_a_pair_of_label_zero_stays_a_negative_but_leaves_the_structures():
    images, texts, labels = as_tensors(written_out_gsc.pairs(6, 4))
    labels[2] = 0
    rest = [0, 1, 3, 4, 5]
    found = gsc_evidence(images, texts, labels)["structure"][rest]
    without = gsc_evidence(images[rest], texts[rest], labels[rest])["structure"]
    assert torch.allclose(found, without, rtol=1e-10)
    GscLoss()(images, texts, labels).backward()
    assert images.grad[2].abs().sum() > 0


def test_all_labels_zero_give_no_nan():
    images, texts, _ = as_tensors(written_out_gsc.pairs(6, 4), torch.float32)
    loss, evidence = GscLoss().with_evidence(images, texts, torch.zeros(6))
    loss.backward()
    assert loss == 0 and images.grad.abs().sum() == 0
    assert evidence["agreement"].isfinite().all() and evidence["structure"].isfinite().all()


def test_low_precision_embeddings_are_computed_with_in_single_precision_even_under_autocast():
    exact = [tensor.detach().bfloat16().float() for tensor in as_tensors(written_out_gsc.pairs(8, 4))]
    low = [tensor.bfloat16() for tensor in exact]
    expected = GscLoss(0.5).with_evidence(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = GscLoss(0.5).with_evidence(*low)
        beside = gsc_evidence(*low)
    assert found[0].dtype == torch.float32 and found[0] == expected[0]
    for name, values in expected[1].items():
        assert found[1][name].equal(values) and torch.allclose(beside[name], values, rtol=1e-6)


def test_no_structure_is_held_and_blocks_bound_the_logits_in_both_passes():
    arrays = written_out_gsc.pairs(64, 4)
    for max_logits in (64 * 64, 10 * 64):
        images, texts, labels = as_tensors(arrays)
        with MadeTensors() as made:
            loss, _ = GscLoss(max_logits=max_logits).with_evidence(images, texts, labels)
            kept = made.alive()
            loss.backward()
        assert made.largest == max_logits
    assert kept < 10 * 64 * 4  # some arrays of the embeddings' size, none of the logits'


def test_batches_without_signal_are_told_once(caplog):
    images, texts, _ = as_tensors(written_out_gsc.pairs(6, 4))
    loss = GscLoss()
    with caplog.at_level(logging.WARNING):
        loss(images, texts, torch.tensor([0.0, 0, 0, 0, 0, 0.02]))
        assert not caplog.records
        for _ in range(2):
            loss(images, texts, torch.full((6,), 0.009))
    (record,) = caplog.records
    assert "All 6 soft labels of a batch are below 0.01" in record.getMessage()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda embeds: GscLoss(gamma=-0.1), "gamma=-0.1"),
        (lambda embeds: GscLoss(temperature=0.0), "temperature=0.0"),
        (lambda embeds: gsc_evidence(embeds, embeds, torch.ones(3), temperature=float("nan")), "temperature=nan"),
        (lambda embeds: GscLoss()(embeds, embeds, torch.ones(2)), r"shape \(2,\) for 3 pairs"),
        (lambda embeds: gsc_evidence(embeds, embeds, torch.ones(3, 1)), r"shape \(3, 1\) for 3 pairs"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(3))
