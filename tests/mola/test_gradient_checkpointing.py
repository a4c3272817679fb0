"""Gradient checkpointing runs layers again in the backward pass: the gradients must be those without it."""

import pytest
import torch
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_resnet, tiny_vit, tokens
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_dissect.mola import mola_routing, register_router

TASKS = torch.tensor([0, 1, 0, 1])


def clip():
    base, processor = tiny_clip()
    return base, tiny_inputs(base, processor, CAPTIONS[:4])


BASES = {"clip": clip, "vit": lambda: (tiny_vit(), pictures()), "bert": lambda: (tiny_bert(), tokens())}
WEIGHTINGS = {
    "grad": {"variant": "grad"},
    "pixels": {"router_input": "pixels"},
    "embeddings": {"router_input": "embeddings"},
}
CASES = [
    (base, weighting, decorrelated)
    for base in BASES
    for weighting in WEIGHTINGS
    for decorrelated in (False, True)
    if not (base == "bert" and weighting == "pixels") and not (weighting == "grad" and decorrelated)
]


def make(base: str, weighting: str, **fields):
    model, batch = BASES[base]()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return adapted(model.double(), **WEIGHTINGS[weighting] | fields).train(), batch


def gradients(model, batch, decorrelated: bool) -> dict[str, torch.Tensor]:
    """Of a loss on the outputs of the whole model, every trainable parameter."""
    model.zero_grad(set_to_none=True)
    outputs = model(**batch, task_ids=TASKS)
    tensors = [outputs[name] for name in ("logits_per_image", "last_hidden_state", "pooler_output") if name in outputs]
    loss = sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in tensors)
    if decorrelated:
        loss = loss + mola_routing(model).decorrelation_loss(TASKS)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert (found[name] - gradient).abs().max() < 1e-10, name


def switch_on(model, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.base_model.model.is_gradient_checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(("base", "weighting", "decorrelated"), CASES)
def test_gradients_are_those_without_checkpointing(base, weighting, decorrelated, use_reentrant):
    model, batch = make(base, weighting)
    expected = gradients(model, batch, decorrelated)
    reached = {name for name, gradient in expected.items() if gradient is not None and gradient.abs().sum() > 0}
    assert any("mola_A" in name for name in reached)
    assert any("mola_router" in name for name in reached) == (weighting != "grad")
    assert any("projection" in name for name in reached) == decorrelated
    switch_on(model, use_reentrant)
    assert_same(gradients(model, batch, decorrelated), expected)
    assert_same(gradients(model, batch, decorrelated), expected)  # nothing is left over from the first pass


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("weighting", ["pixels", "embeddings"])
def test_a_router_makes_the_inputs_of_reentrant_blocks_require_a_gradient_by_itself(weighting, use_reentrant):
    model, batch = make("vit", weighting)
    expected = gradients(model, batch, True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(gradients(model, batch, True), expected)


def test_accumulated_gradients_add_up():
    model, batch = make("vit", "pixels")
    once = gradients(model, batch, True)
    switch_on(model, use_reentrant=True)
    model.zero_grad()
    for _ in range(2):
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        outputs = model(**batch)
        tensors = [outputs["last_hidden_state"], outputs["pooler_output"]]
        loss = sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in tensors)
        (loss + mola_routing(model).decorrelation_loss(TASKS)).backward()
    assert before
    assert_same({n: p.grad / 2 for n, p in model.named_parameters() if p.requires_grad}, once)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_two_passes_before_one_backward_pass_keep_their_weights_apart(weighting, use_reentrant):
    model, batch = make("vit", weighting)
    other = {"pixel_values": batch["pixel_values"].flip(2) * 2}

    def both():
        model.zero_grad(set_to_none=True)
        first = model(**batch, task_ids=TASKS).last_hidden_state
        second = model(**other, task_ids=(TASKS + 1) % 3).last_hidden_state
        with torch.no_grad():
            model(**other, task_ids=torch.full((4,), 2))  # between forward and backward
        upstream = torch.linspace(-1, 1, first.numel()).view_as(first)
        ((first + second.square()) * upstream).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = both()
    switch_on(model, use_reentrant)
    assert_same(both(), expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_towers_called_one_after_the_other_keep_their_weights(weighting, use_reentrant):
    model, batch = make("clip", weighting)
    tasks = {"task_ids": TASKS} if weighting == "grad" else {}

    def both():
        model.zero_grad(set_to_none=True)
        images = model.get_image_features(pixel_values=batch["pixel_values"], **tasks).pooler_output
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        captions = model.get_text_features(**texts, **tasks).pooler_output
        (images @ captions.T * torch.linspace(-1, 1, 16).view(4, 4)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = both()
    switch_on(model, use_reentrant)
    assert_same(both(), expected)


def test_evaluation_between_passes_changes_nothing():
    model, batch = make("clip", "pixels")
    expected = gradients(model, batch, True)
    switch_on(model, use_reentrant=True)
    with torch.no_grad():
        model.eval()(**batch)
        model.train()
    assert_same(gradients(model, batch, True), expected)


def test_a_checkpoint_around_blocks_of_ones_own_needs_no_switch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.checkpoint = False

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.second, x, use_reentrant=False) if self.checkpoint else self.second(x)

    model = adapted(Net().double(), variant="grad", target_modules=["first", "second"]).train()
    x, found = torch.randn(4, 4, dtype=torch.float64), []
    for switch in (False, True):
        model.base_model.model.checkpoint = switch
        model.zero_grad()
        model(x, task_ids=TASKS).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same(found[1], found[0])


def test_a_registered_router_tells_that_it_needs_the_other_mode():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(3, 3)

        def forward(self, pixel_values, **others):
            return self.scores(pixel_values.mean((2, 3)))

    register_router("mean colour", lambda config, model: Mean())
    model = adapted(tiny_vit().double(), router_input="mean colour").train()
    batch = pictures(dtype=torch.float64)
    expected = gradients(model, batch, True)
    switch_on(model, use_reentrant=True)
    with pytest.raises(ValueError, match="does not work with reentrant.*'use_reentrant': False"):
        model(**batch)
    switch_on(model, use_reentrant=False)
    assert_same(gradients(model, batch, True), expected)


def test_batch_norm_statistics_of_the_router_are_those_of_one_pass():
    model, batch = make("vit", "pixels")
    model(**batch)
    expected = {name: value.clone() for name, value in model.named_buffers() if "mola_router" in name}
    assert expected
    for use_reentrant in (True, False):
        model, batch = make("vit", "pixels")
        switch_on(model, use_reentrant)
        gradients(model, batch, False)
        for name, value in model.named_buffers():
            if name in expected:
                assert torch.equal(value, expected[name]), name


def test_a_model_that_cannot_checkpoint_says_so_as_without_an_adapter():
    with pytest.raises(ValueError, match="does not support"):
        adapted(tiny_resnet()).gradient_checkpointing_enable()
