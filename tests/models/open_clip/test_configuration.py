"""What cannot be converted between open_clip and transformers is refused by the setting at fault."""

import json

import pytest
from testing.open_clip_folders import CLIP, SIGLIP, SIGLIP_TOWER, changed, write_configuration
from testing.tiny_models import tiny_clip, tiny_siglip, tiny_siglip2
from transformers import CLIPConfig, SiglipConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.models.open_clip.configuration import NotConvertible, build_config, describe_config
from hf_dissect.models.open_clip.processors import build_image_processor, describe_image_processor
from hf_dissect.models.open_clip.siglip_towers import SIGLIP_TOWERS, SiglipTower


@pytest.fixture(autouse=True)
def tower(monkeypatch):
    monkeypatch.setitem(SIGLIP_TOWERS, SIGLIP_TOWER, SiglipTower(32, 2, 2, 128, 8, 32, "gelu"))


REFUSED = {
    "multimodal_cfg: a CoCa model": changed(CLIP, multimodal_cfg={"width": 8}),
    "hf_model_name='roberta-base': a text tower of another": changed(CLIP, text_cfg={"hf_model_name": "roberta-base"}),
    "a ResNet": changed(CLIP, vision_cfg={"layers": [3, 4, 6, 3]}),
    "timm_model_name='convnext_base': a vision tower of timm": changed(
        CLIP, vision_cfg={"timm_model_name": "convnext_base"}
    ),
    "vit_base_patch16_siglip_gap_224": changed(
        SIGLIP, vision_cfg={"timm_model_name": "vit_base_patch16_siglip_gap_224"}
    ),
    "vision_cfg.ls_init_value=0.0001": changed(CLIP, vision_cfg={"ls_init_value": 1e-4}),
    "vision_cfg.pool_type='avg'": changed(CLIP, vision_cfg={"pool_type": "avg"}),
    "vision_cfg.no_ln_pre=True": changed(CLIP, vision_cfg={"no_ln_pre": True}),
    "vision_cfg.attentional_pool='parallel'": changed(CLIP, vision_cfg={"attentional_pool": "parallel"}),
    "vision_cfg.qk_norm=True": changed(CLIP, vision_cfg={"qk_norm": True}),
    r"vision_cfg.image_size=\[32, 48\]": changed(CLIP, vision_cfg={"image_size": [32, 48]}),
    "text_cfg.no_causal_mask=True": changed(CLIP, text_cfg={"no_causal_mask": True}),
    "text_cfg.pool_type='last'": changed(CLIP, text_cfg={"pool_type": "last"}),
    "text_cfg.embed_cls=True": changed(CLIP, text_cfg={"embed_cls": True}),
    "text_cfg.proj_type='none'": changed(CLIP, text_cfg={"proj_type": "none"}),
    "text_cfg.tokenizer_mode='clips'": changed(CLIP, text_cfg={"tokenizer_mode": "clips"}),
    "text_cfg.eos_id=2": changed(CLIP, text_cfg={"pool_type": "eos"}),
    "act_kwargs={'approximate': 'tanh'} with quick_gelu": changed(
        CLIP, quick_gelu=True, vision_cfg={"act_kwargs": {"approximate": "tanh"}}
    ),
    "norm_kwargs={'bias': False}": changed(CLIP, text_cfg={"norm_kwargs": {"bias": False}}),
    "init_logit_bias=-10: a ViT of CLIP with the bias": changed(CLIP, init_logit_bias=-10),
    "model_cfg.colour='red', a setting that is not known": changed(CLIP, colour="red"),
    "vision_cfg.registers=4, a setting that is not known": changed(CLIP, vision_cfg={"registers": 4}),
    "vision_cfg is missing": {name: value for name, value in CLIP.items() if name != "vision_cfg"},
    "timm_pool='avg'": changed(SIGLIP, vision_cfg={"timm_pool": "avg"}),
    "timm_proj='linear'": changed(SIGLIP, vision_cfg={"timm_proj": "linear"}),
    "text_cfg.pool_type='argmax'": changed(SIGLIP, text_cfg={"pool_type": "argmax"}),
    "init_logit_bias is missing": changed(SIGLIP, init_logit_bias=None),
    "embed_dim=64, where vit_tiny": changed(SIGLIP, embed_dim=64),
    "image_size=64, where vit_tiny": changed(SIGLIP, vision_cfg={"image_size": 64}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_architectures_that_transformers_lacks_are_refused_before_weights_are_read(message, tmp_path):
    write_configuration(tmp_path, REFUSED[message])
    with pytest.raises(ValueError, match=f"{message}.*take one of these") as caught:
        load_model_and_processor(name_or_path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_sizes_are_translated():
    config = build_config(changed(CLIP, quick_gelu=True, vision_cfg={"image_size": [32, 32], "patch_dropout": 0.5}))
    assert isinstance(config, CLIPConfig) and config.projection_dim == 24
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.intermediate_size) == (48, 4, 120)
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (32, 8, 2)
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (40, 4, 160)
    assert (text.max_position_embeddings, text.vocab_size) == (77, 49408)
    assert vision.hidden_act == text.hidden_act == "quick_gelu"
    # 1408 * 4.3637 is 6144.09, as in ViT-g-14.
    giant = build_config(changed(CLIP, vision_cfg={"width": 1408, "head_width": 88, "mlp_ratio": 4.3637}))
    assert giant.vision_config.intermediate_size == 6144 and giant.vision_config.hidden_act == "gelu"
    siglip = build_config(SIGLIP)
    assert isinstance(siglip, SiglipConfig) and siglip.vision_config.hidden_act == "gelu"
    assert siglip.text_config.hidden_act == "gelu_pytorch_tanh" and siglip.text_config.layer_norm_eps == 1e-6


@pytest.mark.parametrize("model", [CLIP, changed(CLIP, quick_gelu=True), SIGLIP])
def test_a_description_is_what_it_was_made_from(model):
    config = build_config(model)
    described = describe_config(config, config.text_config.max_position_embeddings, largest_token=49407)
    config.text_config.eos_token_id = 2
    assert build_config(described).to_dict() == build_config(model).to_dict()


def test_models_that_open_clip_lacks_are_refused():
    def refuse(config, match):
        with pytest.raises(NotConvertible, match=match):
            describe_config(config, 16, largest_token=9)

    refuse(tiny_siglip2()[0].config, "a model of type 'siglip2'")
    refuse(tiny_siglip()[0].config, "timm, .* has none of the sizes .*width=32")
    config = tiny_clip()[0].config
    config.text_config.hidden_act = "relu"
    refuse(config, "hidden_act='(relu|quick_gelu)'")
    config = tiny_clip()[0].config
    config.vision_config.num_channels = 4
    refuse(config, "num_channels=4")


def test_an_end_token_within_the_vocabulary_is_named():
    config = tiny_clip()[0].config
    end = config.text_config.eos_token_id
    assert "pool_type" not in describe_config(config, 16, largest_token=end)["text_cfg"]
    text = describe_config(config, 16, largest_token=end + 7)["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", end)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"resize_mode": "longest"}, "resize_mode='longest'"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"mode": "L"}, "mode='L'"),
    ],
)
def test_pictures_that_are_prepared_otherwise_are_refused(given, match):
    with pytest.raises(NotConvertible, match=match):
        build_image_processor("clip", 32, given)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_preparation_of_pictures_is_translated_in_both_directions(mode, interpolation):
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": mode, "interpolation": interpolation}
    for model_type in ("clip", "siglip"):
        described = describe_image_processor(build_image_processor(model_type, 32, given), 32)
        assert {name: described[name] for name in given} == given and described["size"] == 32
    described = describe_image_processor(build_image_processor("clip", 32, {"interpolation": "random"}), 32)
    assert described["interpolation"] == "bicubic" and described["mean"][0] == 0.48145466  # OpenAI's


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, "resizes to .*40.* crops to .*32"),
        ({"size": {"height": 32, "width": 48}, "do_center_crop": False}, "resizes to"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 1}, "resample=1"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False, "rescale_factor": 1.0}, "rescale_factor=1.0"),
    ],
)
def test_processors_that_open_clip_lacks_are_refused(settings, match):
    with pytest.raises(NotConvertible, match=match):
        describe_image_processor(CLIPImageProcessorPil(**settings), 32)


def test_pixels_that_are_not_normalised_stay_so():
    square = {"height": 32, "width": 32}
    described = describe_image_processor(
        CLIPImageProcessorPil(size=square, do_center_crop=False, do_normalize=False), 32
    )
    assert described["mean"] == [0.0] * 3 and described["std"] == [1.0] * 3


@pytest.mark.parametrize(
    "content", ['{"model_cfg": ', "[]", "{}", '{"model_cfg": []}', '{"model_cfg": null}', json.dumps("x")]
)
def test_a_damaged_configuration_is_named(content, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(OSError, match="open_clip_config.json cannot be read as a configuration.*copy or download"):
        load_model_and_processor(name_or_path=str(tmp_path))


@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
def test_a_section_that_is_not_one_is_named(section, tmp_path):
    write_configuration(tmp_path, {**CLIP, section: 3})
    with pytest.raises(ValueError, match=f"{section} is a int"):
        load_model_and_processor(name_or_path=str(tmp_path))
