"""Dropped patches take their positions along, positions fit smaller pictures, and the model stays what it was."""

import math

import pytest
import torch
import torch.nn.functional as F
from testing import tiny_models
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from hf_dissect import TwinDualEncoder
from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.grad_cache import grad_cached_backward
from hf_dissect.models.patch_tokens import PatchTokens, check_patch_dropout, choose_spread, shrink_pictures

SIDE, PATCH = 32, 8
VISION = {**tiny_models.TRANSFORMER, "image_size": SIDE, "patch_size": PATCH}
FAMILIES = [name for name in tiny_models.FAMILIES if name not in ("tiny_align", "tiny_siglip2")]


def small_patches(family: str, monkeypatch):
    """A tiny model with 16 patches a picture."""
    monkeypatch.setattr(tiny_models, "PATCH_SIZE", PATCH)
    return getattr(tiny_models, family)()


def dual_encoder(vision):
    """A dual encoder of another vision tower and BERT."""
    torch.manual_seed(0)
    tokenizer = tiny_models.bert_tokenizer()
    text = BertConfig(**tiny_models._text_config(tokenizer))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=32)
    processor = tiny_models.tiny_dual_encoder()[1]
    model = VisionTextDualEncoderModel(config).eval()
    for name, weight in model.vision_model.named_parameters():
        if "position" in name:  # zeros in a new DeiT
            torch.nn.init.normal_(weight, std=0.1)
    return model, processor


OTHERS = {
    "deit": (DeiTConfig(**VISION), 2),
    "dinov2": (Dinov2Config(**VISION), 1),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**VISION, num_register_tokens=3), 4),
}


def note_tokens(model):
    """Note what the patch embeddings put out, as the rest of the tower sees it."""
    seen = []
    model.vision_model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


def inputs_of(model, processor):
    return tiny_models.tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])


def check_dropped(model, processor, prefix: int, dropout: float = 0.75) -> None:
    """In training, a quarter of 16 patches stays with what it was in evaluation, and other ones in each picture."""
    inputs = inputs_of(model, processor)
    before = note_tokens(model)
    plain = model(**inputs).image_embeds
    whole = before.pop()
    assert whole.shape[1] == prefix + 16
    tokens = PatchTokens(dropout)
    tokens.attach(model)
    seen = note_tokens(model)
    assert torch.equal(model(**inputs).image_embeds, plain), "nothing is dropped in evaluation"
    seen.clear()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    state = torch.get_rng_state()
    model(**inputs)
    (left,) = seen
    assert left.shape[1] == prefix + 4 and torch.equal(left[:, :prefix], whole[:, :prefix])
    places = [
        [int((whole[picture, prefix:] == token).all(-1).nonzero()) for token in left[picture, prefix:]]
        for picture in range(4)
    ]
    assert all(sorted(set(chosen)) == chosen for chosen in places) and len({tuple(chosen) for chosen in places}) > 1
    torch.set_rng_state(state)
    model(**inputs)
    assert torch.equal(seen[1], left), "the random state decides"
    model(**inputs)
    assert not torch.equal(seen[2], left)
    tokens.detach()
    model(**inputs)
    assert seen[3].shape[1] == prefix + 16


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_dropped_in_training(family, monkeypatch):
    model, processor = small_patches(family, monkeypatch)
    check_dropped(model, processor, prefix=0 if family == "tiny_siglip" else 1)


@pytest.mark.parametrize("name", OTHERS)
def test_patches_of_other_towers_are_dropped_in_training(name):
    vision, prefix = OTHERS[name]
    check_dropped(*dual_encoder(vision), prefix=prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_interpolated(family, monkeypatch):
    """Half-size pictures get positions that are, by bicubic interpolation, those of the model's grid."""
    model, processor = small_patches(family, monkeypatch)
    inputs = inputs_of(model, processor)
    small = shrink_pictures(inputs, 16)
    tokens = PatchTokens()
    with pytest.raises((ValueError, RuntimeError)):
        model(**small)
    tokens.attach(model)
    seen = note_tokens(model)
    model(**small)
    embeddings = model.vision_model.embeddings
    table = getattr(embeddings, "position_embedding", None)
    table = embeddings.position_embeddings[0] if table is None else table.weight
    prefix = len(table) - 16
    grid = table[prefix:].T.reshape(1, -1, 4, 4)
    fitted = F.interpolate(grid, size=(2, 2), mode="bicubic", align_corners=False).flatten(2)[0].T
    with torch.no_grad():
        table.copy_(torch.zeros_like(table)) if table.is_leaf else embeddings.position_embeddings.zero_()
    model(**small)
    torch.testing.assert_close(seen[0][:, prefix:] - seen[1][:, prefix:], fitted.expand(4, -1, -1))
    tokens.detach()


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_read_smaller_pictures(name):
    model, processor = dual_encoder(OTHERS[name][0])
    seen = note_tokens(model)
    tokens = PatchTokens()
    tokens.attach(model)
    model(**shrink_pictures(inputs_of(model, processor), 16))
    assert seen[0].shape[1] == OTHERS[name][1] + 4


def test_pictures_are_scaled_down_by_areas():
    pixels = torch.randn(2, 3, 32, 32)
    pixels[0] = 0.25
    small = shrink_pictures({"pixel_values": pixels, "input_ids": torch.ones(2, 3)}, 16)
    assert small["pixel_values"].shape == (2, 3, 16, 16) and small["input_ids"].shape == (2, 3)
    assert torch.allclose(small["pixel_values"][0], torch.tensor(0.25))
    wanted = F.interpolate(pixels, size=16, mode="bilinear", antialias=True)
    assert torch.equal(small["pixel_values"], wanted)
    assert torch.equal(shrink_pictures({"pixel_values": pixels}, 64)["pixel_values"], pixels)
    features = torch.randn(2, 7)
    assert shrink_pictures({"pixel_values": features}, 2)["pixel_values"] is features


class Replayed(PatchTokens):
    """Drops the patches that were drawn before."""

    def __init__(self, drawn):
        super().__init__(0.5)
        self.drawn = iter(drawn)

    def choose(self, num_pictures, num_patches, device):
        return next(self.drawn)


class Noted(PatchTokens):
    """Notes what it draws."""

    def __init__(self):
        super().__init__(0.5)
        self.drawn = []

    def choose(self, *arguments):
        self.drawn.append(super().choose(*arguments))
        return self.drawn[-1]


def gradients_of(model):
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("adapt", [None, tiny_models.with_lora, tiny_models.with_mola])
def test_chunks_of_a_cached_step_drop_the_same_patches_twice(adapt, monkeypatch):
    model, processor = small_patches("tiny_clip", monkeypatch)
    model = model if adapt is None else adapt(model)
    inputs, loss = inputs_of(model, processor), ContrastiveLoss()
    tokens = Noted()
    tokens.attach(model)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # chunks have other statistics than the batch
    compute = lambda outputs, scale, bias: loss(outputs, scale=scale, bias=bias)  # noqa: E731
    grad_cached_backward(model, inputs, compute, chunk_size=2)
    assert len(tokens.drawn) == 4
    assert torch.equal(tokens.drawn[0], tokens.drawn[2]) and torch.equal(tokens.drawn[1], tokens.drawn[3])
    cached = gradients_of(model)
    replayed = Replayed([torch.cat(tokens.drawn[:2])])
    tokens.detach()
    replayed.attach(model)
    grad_cached_backward(model, inputs, compute, chunk_size=4)
    plain = gradients_of(model)
    assert cached.keys() == plain.keys() and len(plain) > 4
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_keeps_the_patches(monkeypatch):
    found = []
    for keywords in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model, processor = small_patches("tiny_clip", monkeypatch)
        if keywords is not None:
            model.gradient_checkpointing_enable(keywords)
        tokens = PatchTokens(0.5)
        tokens.attach(model)
        torch.manual_seed(3)
        model.train()(**inputs_of(model, processor), return_loss=True).loss.backward()
        found.append(gradients_of(model))
    for other in found[1:]:
        assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in found[0].items())


def test_patches_of_scoring_are_the_same_ones_and_spread_evenly(monkeypatch):
    for count, dropout in ((196, 0.5), (196, 0.75), (49, 0.5), (16, 0.9)):
        kept = choose_spread(count, dropout)
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == max(1, round((1 - dropout) * count))
        side = math.isqrt(count)
        places = torch.arange(count)
        quarter = (places // side >= side / 2) * 2 + (places % side >= side / 2)
        shares = torch.bincount(quarter[kept], minlength=4) - (1 - dropout) * torch.bincount(quarter, minlength=4)
        assert shares.abs().max() <= 2, (count, shares)
    model, processor = small_patches("tiny_clip", monkeypatch)
    inputs, tokens = inputs_of(model, processor), PatchTokens(0.25, scoring_dropout=0.5)
    tokens.attach(model)
    seen = note_tokens(model)
    model(**inputs)
    state = torch.get_rng_state()
    with tokens.scoring():
        model(**inputs)
    assert torch.equal(seen[1][:, 1:], seen[0][:, 1:][:, choose_spread(16, 0.5)])
    assert torch.equal(state, torch.get_rng_state())
    model(**inputs)
    assert torch.equal(seen[2], seen[0])
    with tokens.scoring():
        model.train()(**inputs)  # a training step within it, if anyone did so, drops the share of training
    assert seen[3].shape[1] == 1 + 12


def test_two_networks_are_refused():
    twins = TwinDualEncoder.of(tiny_models.tiny_clip()[0], tiny_models.tiny_clip(1)[0])
    with pytest.raises(ValueError, match="patch_dropout=0.5 is not for two networks"):
        check_patch_dropout(twins, 0.5, "patch_dropout")


def test_a_clip_tower_of_a_dual_encoder_counts():
    vision = CLIPVisionConfig(**VISION)
    model, processor = dual_encoder(vision)
    assert isinstance(model.vision_model, CLIPVisionModel)
    check_dropped(model, processor, prefix=1)
