"""The differences between the model families, on a tiny model of each."""

import math

import pytest
import torch
from testing import tiny_models
from testing.tiny_models import CAPTIONS, FAMILIES, Wrapper, tiny_inputs, with_lora
from torch import nn
from transformers import BertConfig, BertModel

from hf_dissect.models.loading import (
    bare_model,
    check_dual_encoder,
    clamp_logit_scale_,
    find_loss_kind,
    find_max_text_length,
    find_text_padding,
    freeze_tower,
    load_model_and_processor,
    logit_scale_and_bias,
    logit_scale_parameter,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_bias_make_the_models_own_logits_of_cosines(family):
    model, processor = getattr(tiny_models, family)()
    if find_loss_kind(model) == "sigmoid":
        nn.init.constant_(model.logit_bias, -3.0)
        nn.init.constant_(model.logit_scale, 1.5)
    outputs = model(**tiny_inputs(model, processor, CAPTIONS[:4]))
    scale, bias = logit_scale_and_bias(model)
    cosines = nn.functional.cosine_similarity(outputs.text_embeds[:, None], outputs.image_embeds[None], dim=-1)
    torch.testing.assert_close(cosines * scale + bias, outputs.logits_per_text, rtol=1e-4, atol=1e-5)
    assert scale.shape == bias.shape == ()
    assert scale.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_padding_a_family_is_given_does_not_change_its_embeddings(family):
    model, processor = getattr(tiny_models, family)()
    captions = ["red left", "there is blue at the right"]
    together = tiny_inputs(model, processor, captions)
    alone = tiny_inputs(model, processor, captions[:1])
    image_keys = {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    texts = [{key: value for key, value in batch.items() if key not in image_keys} for batch in (together, alone)]
    with torch.no_grad():
        in_batch, by_itself = (model.get_text_features(**batch).pooler_output[0] for batch in texts)
    torch.testing.assert_close(in_batch, by_itself, rtol=1e-4, atol=1e-5)


def test_only_siglip_trains_with_the_sigmoid_loss_and_is_padded_to_the_full_length():
    facts = {}
    for family in FAMILIES:
        model, processor = getattr(tiny_models, family)()
        facts[family] = (find_loss_kind(model), find_text_padding(model), find_text_padding(model.config))
        assert find_max_text_length(model, processor) == processor.tokenizer.model_max_length
    sigmoid = {family for family, found in facts.items() if found == ("sigmoid", "max_length", "max_length")}
    softmax = {family for family, found in facts.items() if found == ("softmax", "longest", "longest")}
    assert sigmoid == {"tiny_siglip", "tiny_siglip2"}
    assert softmax == set(FAMILIES) - sigmoid


def test_the_position_table_and_the_tokenizer_limit_the_caption(tiny_clip):
    model, processor = tiny_clip
    processor.tokenizer.model_max_length = 9
    assert find_max_text_length(model, processor) == 9
    processor.tokenizer.model_max_length = int(1e30)
    assert find_max_text_length(model, processor.tokenizer) == tiny_models.MAX_LENGTH


@pytest.mark.parametrize(
    "wrap", [lambda model: model, Wrapper, torch.compile, with_lora, lambda m: Wrapper(with_lora(m))]
)
def test_a_dual_encoder_is_recognised_through_wrappers(wrap, tiny_clip):
    model = tiny_clip[0]
    wrapped = wrap(model)
    check_dual_encoder(wrapped)
    assert bare_model(wrapped) is model
    assert find_loss_kind(wrapped) == "softmax"
    assert logit_scale_parameter(wrapped) is model.logit_scale


def test_a_model_without_the_two_methods_is_refused_by_name(tmp_path):
    model = BertModel(BertConfig(**tiny_models.TRANSFORMER, vocab_size=10))
    with pytest.raises(ValueError, match="BertModel has no get_image_features and no get_text_features.*VisionText"):
        check_dual_encoder(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertModel has no get_image_features"):
        load_model_and_processor(name_or_path=str(tmp_path))
    model.get_text_features = lambda: None
    with pytest.raises(ValueError, match="BertModel has no get_image_features, so"):
        check_dual_encoder(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_frozen_tower_keeps_its_weights_and_its_projection_learns(family, tower):
    model, processor = getattr(tiny_models, family)()
    module = getattr(model, f"{tower}_model")
    count = freeze_tower(model, tower)
    assert count == sum(parameter.numel() for parameter in module.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_inputs(model, processor, CAPTIONS[:4]), return_loss=True).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # The buffers are in the state: batch-norm statistics of a frozen tower must not have moved either.
    assert changed and not any(name.startswith(f"{tower}_model.") for name in changed)
    for projection in ("visual_projection",) if tower == "vision" else ("text_projection",):
        if hasattr(model, projection):
            assert f"{projection}.weight" in changed


def test_a_frozen_tower_stays_in_evaluation_mode_and_the_rest_does_not(tiny_dual_encoder):
    model, processor = tiny_dual_encoder
    freeze_tower(Wrapper(model), "vision")
    model.train()
    model(**tiny_inputs(model, processor, CAPTIONS[:4]))
    assert not any(module.training for module in model.vision_model.modules())
    assert model.training and model.text_model.training


def test_freezing_anything_else_is_an_error(tiny_clip):
    with pytest.raises(ValueError, match="freeze must be one of vision, text or None, got 'image'"):
        freeze_tower(tiny_clip[0], "image")
    with pytest.raises(ValueError, match="freeze must be one of vision, text or None, got 'both'"):
        load_model_and_processor(name_or_path="not/read", freeze="both")
    with pytest.raises(ValueError, match="Linear has none of the attributes vision_model"):
        freeze_tower(nn.Linear(2, 2), "vision")


@pytest.mark.parametrize(("before", "after"), [(5.0, math.log(100)), (-0.2, 0.0), (2.5, 2.5)])
def test_the_log_scale_is_kept_between_0_and_ln_100(before, after, tiny_clip):
    model = tiny_clip[0]
    nn.init.constant_(model.logit_scale, before)
    clamp_logit_scale_(Wrapper(model))
    assert model.logit_scale.item() == pytest.approx(after)
    assert model.logit_scale.is_leaf and model.logit_scale.requires_grad


@pytest.mark.parametrize(("before", "after"), [(0.001, 0.01), (3.0, 1.0), (0.07, 0.07)])
def test_aligns_temperature_is_kept_between_a_hundredth_and_1(before, after):
    model, _ = tiny_models.tiny_align()
    nn.init.constant_(model.temperature, before)
    clamp_logit_scale_(model)
    assert model.temperature.item() == pytest.approx(after)
    assert logit_scale_and_bias(model)[0].item() == pytest.approx(1 / after)


def test_a_frozen_scale_and_that_of_a_sigmoid_model_are_left_alone(tiny_clip, tiny_siglip):
    nn.init.constant_(tiny_clip[0].logit_scale, 9.0)
    tiny_clip[0].logit_scale.requires_grad_(False)
    nn.init.constant_(tiny_siglip[0].logit_scale, 4.8)
    clamp_logit_scale_(tiny_clip[0])
    clamp_logit_scale_(tiny_siglip[0])
    assert tiny_clip[0].logit_scale.item() == 9.0
    assert tiny_siglip[0].logit_scale.item() == pytest.approx(4.8)


def test_a_model_without_a_scale_has_scale_1_and_bias_0():
    model = nn.Linear(2, 2)
    assert logit_scale_parameter(model) is None
    clamp_logit_scale_(model)
    assert [value.item() for value in logit_scale_and_bias(model)] == [1.0, 0.0]
