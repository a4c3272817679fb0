"""Stored image features in the place of a vision tower."""

import importlib
import math

import pytest
import torch
from testing import tiny_models
from transformers import AutoModel, PreTrainedTokenizerBase

import hf_dissect.models.feature_encoder
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig, PrecomputedFeaturesModel
from hf_dissect.models.loading import check_same_architecture, freeze_tower, load_model_and_processor

FEATURES = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 7 + 1
CONFIG = {
    "model_type": "vision-text-dual-encoder",
    "vision_config": {"model_type": "precomputed_features", "hidden_size": 12},
    "text_config": {"model_type": "bert", **tiny_models.TRANSFORMER},
    "projection_dim": 16,
}


def build():
    return load_model_and_processor(
        config=CONFIG, captions=tiny_models.CAPTIONS, vocab_size=300, max_caption_length=16, freeze="vision"
    )


def test_features_come_out_with_unit_coordinates_on_average():
    output = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=12)).eval()(FEATURES)
    expected = torch.stack([row / math.sqrt(sum(x * x for x in row.tolist())) * math.sqrt(12) for row in FEATURES])
    torch.testing.assert_close(output.pooler_output, expected)
    assert output.last_hidden_state.shape == (4, 1, 12)
    assert torch.equal(output.last_hidden_state[:, 0], output.pooler_output)


def test_a_zero_vector_stays_finite():
    output = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=3))(torch.zeros(1, 3))
    assert torch.equal(output.pooler_output, torch.zeros(1, 3))


def test_features_are_left_as_they_are_without_normalize():
    model = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=12, normalize=False))
    assert torch.equal(model(FEATURES).pooler_output, FEATURES)
    assert torch.equal(model(FEATURES, return_dict=False)[1], FEATURES)


def test_dropout_acts_in_training_only():
    model = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=12, dropout=0.5, normalize=False))
    assert (model.train()(FEATURES).pooler_output == 0).any()
    assert torch.equal(model.eval()(FEATURES).pooler_output, FEATURES)


@pytest.mark.parametrize("shape", [(4, 11), (4, 12, 1), (12,), (4, 3, 32, 32)])
def test_another_shape_is_refused_by_name(shape):
    model = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=12))
    with pytest.raises(ValueError, match=r"pixel_values must be stored features of shape \(B, 12\).*hidden_size"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(("fields", "message"), [({"hidden_size": 0}, "hidden_size"), ({"dropout": 1.0}, "dropout")])
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PrecomputedFeaturesConfig(**fields)


def test_a_dual_encoder_on_features_trains_its_projection_and_text_tower():
    model, tokenizer = build()
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert tokenizer.model_max_length == 16
    batch = tokenizer(tiny_models.CAPTIONS[:4], padding=True, return_tensors="pt")
    outputs = model.train()(**batch, pixel_values=FEATURES, return_loss=True)
    outputs.loss.backward()
    assert outputs.logits_per_image.shape == (4, 4)
    assert model.visual_projection.weight.grad.abs().sum() > 0
    assert model.text_projection.weight.grad.abs().sum() > 0


def test_it_saves_and_loads(tmp_path):
    model, tokenizer = build()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_model_and_processor(name_or_path=str(tmp_path))
    assert type(loaded.vision_model) is PrecomputedFeaturesModel
    batch = tokenizer(tiny_models.CAPTIONS[:4], padding=True, return_tensors="pt")
    again = loaded_tokenizer(tiny_models.CAPTIONS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, pixel_values=FEATURES).logits_per_image
        assert torch.equal(loaded(**again, pixel_values=FEATURES).logits_per_image, expected)
    check_same_architecture(model, tmp_path)


def test_the_tower_has_nothing_to_freeze():
    assert freeze_tower(build()[0], "vision") == 0


def test_importing_twice_registers_once():
    before = dict(vars(hf_dissect.models.feature_encoder))
    reloaded = importlib.reload(hf_dissect.models.feature_encoder)
    try:
        tower = AutoModel.from_config(reloaded.PrecomputedFeaturesConfig(hidden_size=5))
        assert type(tower) is reloaded.PrecomputedFeaturesModel
    finally:
        hf_dissect.models.feature_encoder.AutoConfig.register(
            "precomputed_features", PrecomputedFeaturesConfig, exist_ok=True
        )
        AutoModel.register(PrecomputedFeaturesConfig, PrecomputedFeaturesModel, exist_ok=True)
        vars(hf_dissect.models.feature_encoder).update(before)  # for the tests after this one
