"""A step in chunks must leave the gradients of the step over the whole batch, to rounding."""

import copy

import pytest
import torch
from testing import tiny_models
from testing.cached_steps import (
    PAIRS,
    assert_same_gradients,
    cached_step,
    loss_of_batch,
    model_and_batch,
    plain_step,
    pop_gradients,
)
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.losses import ContrastiveLoss, grad_cached_backward
from hf_dissect.models.loading import logit_scale_and_bias, logit_scale_parameter
from hf_dissect.models.tasks import select_representations


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("chunk_size", [1, 4, PAIRS])
def test_gradients_of_every_family(family, chunk_size):
    model, batch = model_and_batch(family)
    loss, expected = plain_step(model, batch), pop_gradients(model)
    assert any("logit_scale" in name or "temperature" in name for name in expected)
    assert ("logit_bias" in expected) == family.startswith("tiny_siglip")
    found = cached_step(model, batch, chunk_size)
    rtol = 1e-6 if family == "tiny_siglip2" else 1e-9  # it resizes its positions in single precision
    assert found.item() == pytest.approx(loss.item(), rel=rtol / 1000) and not found.requires_grad
    assert_same_gradients(pop_gradients(model), expected, rtol)


@pytest.mark.parametrize("adapter", ["lora", "router", "grad"])
@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip"])
def test_gradients_of_adapters(family, adapter):
    model, batch = model_and_batch(family, adapter)
    model.train()
    loss, expected = plain_step(model, batch), pop_gradients(model)
    assert any(gradient.any() for name, gradient in expected.items() if "projection" in name) == (adapter == "router")
    assert cached_step(model, batch, 4).item() == pytest.approx(loss.item(), rel=1e-12)
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-9)


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip"])
def test_gradients_in_single_precision(family):
    model, batch = model_and_batch(family, dtype=torch.float32)
    plain_step(model, batch)
    expected = pop_gradients(model)
    cached_step(model.train(), batch, 3)
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-5)


def test_each_chunk_draws_the_same_dropout_twice_and_the_random_state_moves_on_once():
    model, batch = model_and_batch("tiny_dual_encoder")  # whose text tower drops a tenth
    model.train()
    inputs = forward_inputs(model, batch)
    torch.manual_seed(5)
    parts = [
        select_representations(model, model(**{name: value[rows] for name, value in inputs.items()}))
        for rows in (slice(0, 3), slice(3, 6), slice(6, 10))
    ]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in ("image_embeds", "text_embeds")}
    loss = loss_of_batch(model, batch, outputs | {"projections": {}}, *logit_scale_and_bias(model))
    loss.backward()
    expected, next_number = pop_gradients(model), torch.rand(1)
    torch.manual_seed(5)
    assert cached_step(model, batch, 4).item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.rand(1) == next_number
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-9)
    torch.manual_seed(6)
    assert abs(cached_step(model, batch, 4).item() - loss.item()) > 1e-6


def test_batch_norm_statistics_move_once():
    model, batch = model_and_batch("tiny_align")
    model.train()
    once = copy.deepcopy(model)
    for rows in (slice(0, 5), slice(5, 10)):
        once(**{name: value[rows] for name, value in forward_inputs(model, batch).items()})
    cached_step(model, batch, 5)
    moved = dict(model.named_buffers())
    assert any("running_var" in name for name in moved)
    for name, buffer in once.named_buffers():
        assert torch.equal(moved[name], buffer), name


def test_no_more_than_a_chunk_goes_through_the_model():
    model, batch = model_and_batch("tiny_clip")
    seen = []
    model.vision_model.register_forward_hook(lambda _, __, output: seen.append(output.pooler_output))
    cached_step(model, batch, 4)
    assert [len(output) for output in seen] == [3, 3, 4] * 2
    assert [output.requires_grad for output in seen] == [False] * 3 + [True] * 3


def test_the_gradient_is_scaled_and_divided_once():
    model, batch = model_and_batch("tiny_siglip")
    plain_step(model, batch)
    expected = pop_gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    cached_step(model, batch, 4, backward=lambda part: scaler.scale(part / 8).backward())
    found = {name: gradient / 2**9 for name, gradient in pop_gradients(model).items()}
    assert_same_gradients(found, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype):
    model, batch = model_and_batch("tiny_clip", dtype=torch.float32)
    plain_step(model, batch)
    exact = pop_gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    cached_step(
        model,
        batch,
        4,
        backward=lambda part: scaler.scale(part).backward(),
        autocast=lambda: torch.autocast("cpu", dtype),
    )
    found = {name: gradient / 2**12 for name, gradient in pop_gradients(model).items()}
    assert_same_gradients(found, exact, rtol=0.1, floor=0.02)
    assert any(not torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("trained", ["all but the scale", "the scale alone"])
def test_frozen_parts_stay_without_gradient(trained):
    model, batch = model_and_batch("tiny_clip")
    model.requires_grad_(trained == "all but the scale")
    logit_scale_parameter(model).requires_grad_(trained == "the scale alone")
    plain_step(model, batch)
    expected = pop_gradients(model)
    assert ("logit_scale" in expected) == (trained == "the scale alone")
    cached_step(model, batch, 4)
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-9)


def test_gradients_are_added_to_those_already_there():
    model, batch = model_and_batch("tiny_clip")
    plain_step(model, batch)
    expected = {name: 2 * gradient for name, gradient in pop_gradients(model).items()}
    cached_step(model, batch, 4)
    cached_step(model, batch, PAIRS + 1)
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-9)


def test_by_default_the_embeddings_make_the_loss():
    model, batch = model_and_batch("tiny_clip")
    inputs = forward_inputs(model, batch)
    loss = ContrastiveLoss()(model(**inputs))
    loss.backward()
    expected = pop_gradients(model)
    found = grad_cached_backward(
        model, inputs, lambda outputs, scale, bias: ContrastiveLoss()(outputs, scale=scale, bias=bias), chunk_size=3
    )
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_same_gradients(pop_gradients(model), expected, rtol=1e-9)


def test_an_empty_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk_size=0: must be at least 1"):
        grad_cached_backward(nn.Identity(), {}, None, chunk_size=0)
