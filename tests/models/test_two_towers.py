"""Dual encoders of two trained towers: what they compute, that they come back, and what is refused before training."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing import tiny_models
from testing.tiny_models import CAPTIONS, IMAGE_SIZE, tiny_picture
from testing.trained_towers import SQUARE, TEXT, VISION, save_text_tower, save_vision_tower
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, ViTConfig, ViTModel

from hf_dissect.models.dual_encoder import DualEncoder, DualEncoderConfig
from hf_dissect.models.families import find_max_text_length, find_text_padding, freeze_tower
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig
from hf_dissect.models.loading import check_same_architecture, load_model_and_processor
from hf_dissect.models.towers import pool_texts

CAPTIONS_OF_MANY_LENGTHS = ["a red patch", CAPTIONS[3], "left", CAPTIONS[40]]


def load(vision: str, text: str, **settings):
    tower = {"name_or_path": text, **({"pooling": settings.pop("pooling")} if "pooling" in settings else {})}
    return load_model_and_processor(
        vision={"name_or_path": vision}, text=tower, projection_dim=settings.pop("projection_dim", 24), **settings
    )


def make_inputs(model, processor, captions=CAPTIONS_OF_MANY_LENGTHS) -> dict:
    texts = processor.tokenizer(captions, padding=find_text_padding(model), return_tensors="pt")
    pictures = [tiny_picture(index)[0] for index in range(len(captions))]
    return {**texts, **processor.image_processor(images=pictures, return_tensors="pt")}


def check_that_it_comes_back(model, processor, folder) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded, loaded_processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(loaded) is DualEncoder and type(loaded.text_model) is type(model.text_model)
    inputs = make_inputs(model, processor)
    again = make_inputs(loaded, loaded_processor)
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[name], again[name]) for name in inputs)
    with torch.no_grad():
        expected, found = model(**inputs), loaded.eval()(**again)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-6)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    check_same_architecture(loaded, folder)


@pytest.mark.parametrize("kind", TEXT)
def test_any_text_tower(kind, tmp_path):
    model, processor = load(save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t", kind))
    inputs = make_inputs(model, processor)
    texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        embeds = model.get_text_features(**texts).pooler_output
        for row, caption in enumerate(CAPTIONS_OF_MANY_LENGTHS):  # whatever the batch pads it to
            alone = model.get_text_features(**processor.tokenizer([caption], return_tensors="pt")).pooler_output
            torch.testing.assert_close(embeds[row], alone[0], rtol=1e-4, atol=1e-5)
    assert not any("pooler" in name or "decoder" in name for name in model.text_model.state_dict())
    assert find_max_text_length(model, processor) == 16  # the limit of the tokenizer
    check_that_it_comes_back(model, processor, tmp_path / "saved")


@pytest.mark.parametrize("kind", [kind for kind in VISION if kind != "mae"])
def test_any_vision_tower(kind, tmp_path):
    model, processor = load(save_vision_tower(tmp_path / "v", kind), save_text_tower(tmp_path / "t"))
    pixels = make_inputs(model, processor)["pixel_values"]
    tower = AutoModel.from_pretrained(tmp_path / "v").eval()
    with torch.no_grad():
        output = tower(pixels)
        # The classifier has no weights for the pooling layer of a ViT, so that it would be random.
        pooled = output.last_hidden_state[:, 0] if kind == "vit_classifier" else output.pooler_output.flatten(1)
        expected = model.visual_projection(pooled)
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected, rtol=1e-5, atol=1e-6)
    assert model.config.vision_pooling == ("cls" if kind == "vit_classifier" else "pooler")
    check_that_it_comes_back(model, processor, tmp_path / "saved")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_tower_of_a_whole_dual_encoder(family, tmp_path):
    whole, whole_processor = getattr(tiny_models, family)()
    whole.save_pretrained(tmp_path / "whole")
    whole_processor.save_pretrained(tmp_path / "whole")
    vision, text = save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t")
    for pair in ((str(tmp_path / "whole"), text), (vision, str(tmp_path / "whole"))):
        model, processor = load(*pair)
        check_that_it_comes_back(model, processor, tmp_path / "saved")
        taken = model.vision_model if pair[1] == text else model.text_model
        original = whole.vision_model if pair[1] == text else whole.text_model
        weights = {name: value for name, value in original.state_dict().items() if "pooler" not in name}
        assert weights.items() <= weights.items() and all(
            torch.equal(taken.state_dict()[name], value) for name, value in weights.items()
        )
    if family in ("tiny_clip", "tiny_siglip"):  # whose captions are read at their end, as they were trained
        inputs = make_inputs(model, processor)
        texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with torch.no_grad():
            expected = model.text_projection(whole.text_model(**texts).pooler_output)
            torch.testing.assert_close(model.get_text_features(**texts).pooler_output, expected)


def test_a_dual_encoder_of_ours_gives_its_towers_with_their_pooling(tmp_path):
    first, processor = load(
        save_vision_tower(tmp_path / "v", "vit_classifier"), save_text_tower(tmp_path / "t"), pooling="cls"
    )
    first.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    second, _ = load(str(tmp_path / "first"), str(tmp_path / "first"))
    assert (second.config.vision_pooling, second.config.text_pooling) == ("cls", "cls")
    assert torch.equal(
        second.text_model.embeddings.word_embeddings.weight, first.text_model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_reads_the_tokens_that_are_not_padding(side):
    states = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]])
    output = type("Output", (), {"last_hidden_state": states})
    first, last = (0, 1) if side == "right" else (2, 3)
    expected = {
        "mean": torch.stack([states[0].mean(0), (states[1, first] + states[1, last]) / 2]),
        "cls": torch.stack([states[0, 0], states[1, first]]),
        "eot": torch.stack([states[0, 3], states[1, last]]),
    }
    for pooling, value in expected.items():
        assert torch.equal(pool_texts(output, mask, pooling), value), pooling
        assert torch.equal(pool_texts(output, mask.bool(), pooling), value), pooling
    assert torch.equal(pool_texts(output, None, "eot"), states[:, -1])
    assert torch.isfinite(pool_texts(output, torch.zeros(2, 4), "mean")).all()


@pytest.mark.parametrize(
    ("kind", "saved", "asked", "pooling"),
    [
        ("bert", None, None, "mean"),
        ("bert", "pooling_mode_mean_tokens", None, "mean"),
        ("bert", "pooling_mode_cls_token", None, "cls"),
        ("bert", "pooling_mode_cls_token", "mean", "mean"),
        ("mpnet", "pooling_mode_lasttoken", None, "eot"),
        ("gpt2", None, None, "eot"),
        ("gpt2", "pooling_mode_mean_tokens", None, "mean"),
        ("t5", None, None, "mean"),
    ],
)
def test_the_pooling_of_the_captions(kind, saved, asked, pooling, tmp_path):
    text = save_text_tower(tmp_path / "t", kind, sentence_pooling=saved)
    model, _ = load(save_vision_tower(tmp_path / "v"), text, pooling=asked)
    assert model.config.text_pooling == pooling


def test_a_sentence_encoder_in_a_subfolder_with_a_shorter_limit(tmp_path):
    text = tmp_path / "t"
    save_text_tower(text / "0_Transformer")
    modules = [{"path": "0_Transformer", "type": "x.models.Transformer"}, {"path": "1_P", "type": "x.Pooling"}]
    (text / "modules.json").write_text(json.dumps(modules))
    (text / "1_P").mkdir()
    (text / "1_P" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (text / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    model, processor = load(save_vision_tower(tmp_path / "v"), str(text))
    assert model.config.text_pooling == "cls" and processor.tokenizer.model_max_length == 9


def test_captions_are_cut_and_a_decoder_pads_on_the_right(tmp_path):
    text = tmp_path / "t"
    save_text_tower(text, "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(text)
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", padding_side="left"
    )
    plain.save_pretrained(text)
    vision = save_vision_tower(tmp_path / "v")
    model, processor = load(vision, str(text), max_caption_length=5)
    assert (processor.tokenizer.pad_token, processor.tokenizer.padding_side) == ("[SEP]", "right")
    assert processor.tokenizer.model_max_length == 5 and not model.text_model.config.use_cache
    with pytest.raises(ValueError, match="max_caption_length must be at most 24.*got 25"):
        load(vision, str(text), max_caption_length=25)


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_positions_that_begin_behind_the_padding_token_shorten_the_captions(kind, tmp_path):
    vision, text = save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t", kind)
    limit = 24 - 2  # the padding token is number 1
    model, processor = load(vision, text, max_caption_length=limit)
    longest = processor.tokenizer(["red " * 40], truncation=True, return_tensors="pt")
    assert longest["input_ids"].shape == (1, limit)
    model.get_text_features(**longest)
    with pytest.raises(ValueError, match=f"at most {limit}.*got {limit + 1}"):
        load(vision, text, max_caption_length=limit + 1)


def test_the_loss_and_the_logits_are_those_of_clip(tmp_path):
    model, processor = load(save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t"))
    inputs = make_inputs(model, processor)
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    images = normalize(model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
    logits = images @ output.text_embeds.T * model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, logits)
    own = torch.arange(4)
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(output.loss, (loss(logits, own) + loss(logits.T, own)) / 2)
    assert model.logit_scale.item() == pytest.approx(2.6592)
    assert model.visual_projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_every_weight_that_may_train_gets_a_gradient(frozen, tmp_path):
    model, processor = load(save_vision_tower(tmp_path / "v", "resnet"), save_text_tower(tmp_path / "t"))
    freeze_tower(model, frozen)
    model.train()
    before = copy.deepcopy(model.state_dict())
    model(**make_inputs(model, processor), return_loss=True).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.startswith(f"{frozen}_model."), name
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert (moved == set()) == (frozen == "vision")  # running statistics of a frozen tower stay


@pytest.mark.parametrize(("vision", "text"), [("vit", "bert"), ("dinov2", "t5"), ("resnet", "mpnet")])
def test_an_adapter_without_target_modules_reaches_both_towers(vision, text, tmp_path):
    from hf_dissect.models.adapters import add_adapter

    model, processor = load(save_vision_tower(tmp_path / "v", vision), save_text_tower(tmp_path / "t", text))
    for settings in ({"type": "lora", "r": 2}, {"type": "mola", "variant": "router", "num_experts": 2, "r": 2}):
        adapted = add_adapter(copy.deepcopy(model), settings)
        trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
        assert any("vision_model" in name for name in trained) and any("text_model" in name for name in trained)
        adapted(**make_inputs(model, processor))
        locked = add_adapter(copy.deepcopy(model), settings, "vision")
        assert not any("vision_model" in name for name, weight in locked.named_parameters() if weight.requires_grad)


def test_an_adapter_without_defaults_for_a_tower_is_refused(tmp_path):
    from hf_dissect.models.adapters import add_adapter

    model = DualEncoder(
        DualEncoderConfig(
            vision_config={"model_type": "vit_msn", **SQUARE},
            text_config={"model_type": "precomputed_features", "hidden_size": 5},
            vision_size=32,
            text_size=5,
            vision_pooling="cls",
            text_pooling="pooler",
        )
    )
    with pytest.raises(ValueError, match="no default for the vision tower .vit_msn.; name the layers.*q_proj|query"):
        add_adapter(model, {"type": "lora", "r": 2})
    assert get_peft_model(model, LoraConfig(r=2, target_modules=["text_projection"]))(
        pixel_values=torch.ones(2, 3, IMAGE_SIZE, IMAGE_SIZE), text_features=torch.ones(2, 5)
    ).logits_per_image.shape == (2, 2)


def test_stored_features_on_either_side(tmp_path):
    vision, text = save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t")
    sizes = {"vision": 6, "text": 5}
    for stored in ({"vision"}, {"text"}, {"vision", "text"}):
        model, processor = load_model_and_processor(
            vision={"features": True} if "vision" in stored else {"name_or_path": vision},
            text={"features": True} if "text" in stored else {"name_or_path": text},
            projection_dim=8,
            feature_sizes=sizes,
        )
        model.save_pretrained(tmp_path / "saved")
        if processor is not None:
            processor.save_pretrained(tmp_path / "saved")
        loaded, loaded_processor = load_model_and_processor(name_or_path=str(tmp_path / "saved"))
        assert type(loaded_processor) is type(processor)
        images = {"pixel_values": torch.randn(3, 6) if "vision" in stored else torch.randn(3, 3, 32, 32)}
        texts = (
            {"text_features": torch.randn(3, 5)} if "text" in stored else {"input_ids": torch.tensor([[2, 7, 3]] * 3)}
        )
        with torch.no_grad():
            torch.testing.assert_close(loaded(**images, **texts).text_embeds, model(**images, **texts).text_embeds)
    with pytest.raises(ValueError, match="text_features are missing: the text tower reads stored features of 5"):
        model.get_text_features(input_ids=torch.tensor([[2, 3]]))
    with pytest.raises(
        ValueError, match="model.text.features is true, but the data have no stored features.*captions"
    ):
        load_model_and_processor(vision={"name_or_path": vision}, text={"features": True}, feature_sizes={"vision": 6})


def test_segments_reach_only_a_tower_that_has_any(tmp_path):
    model, _ = load(save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "g", "gpt2"))
    tokens = {"input_ids": torch.tensor([[2, 7, 3]])}
    segments = {"token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}
    with torch.no_grad():
        plain, given = (model.get_text_features(**tokens, **more).pooler_output for more in ({}, segments))
    assert torch.equal(plain, given)


def break_weights(folder, marker: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if marker not in name}
    save_file(weights, file, metadata={"format": "pt"})


def test_what_does_not_fit_is_refused(tmp_path):
    vision, text = save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t")
    cases = [
        ({"vision": {"name_or_path": vision}}, "vision is given without text"),
        ({"text": {"name_or_path": text}}, "text is given without vision"),
        ({"vision": {}, "text": {"name_or_path": text}}, "model.vision must have exactly one of name_or_path, timm"),
        (
            {"vision": {"name_or_path": vision, "features": True}, "text": {"name_or_path": text}},
            "exactly one of .*got name_or_path, features",
        ),
        ({"vision": vision, "text": {"name_or_path": text}}, "model.vision must be a mapping"),
        (
            {"vision": {"name_or_path": vision}, "text": {"name_or_path": text, "poling": "cls"}},
            "model.text.poling is not a setting; allowed: name_or_path, features, pooling",
        ),
        (
            {"vision": {"name_or_path": vision}, "text": {"name_or_path": text, "pooling": "max"}},
            "model.text.pooling must be one of mean, cls, eot.*got 'max'",
        ),
        ({"vision": {"name_or_path": text}, "text": {"name_or_path": text}}, "BertModel. reads input_ids.*model.text"),
        ({"vision": {"name_or_path": vision}, "text": {"name_or_path": vision}}, "ViTModel. reads pixel_values"),
        (
            {"vision": {"name_or_path": "nowhere"}, "text": {"name_or_path": text}},
            "model.vision.name_or_path 'nowhere' could not be loaded",
        ),
        (
            {"vision": {"name_or_path": vision}, "text": {"name_or_path": text}, "trust_remote_code": True},
            "model.trust_remote_code in a recipe. is true",
        ),
        (
            {"vision": {"name_or_path": vision}, "text": {"name_or_path": text}, "config": {"model_type": "clip"}},
            "exactly one of name_or_path and config",
        ),
        ({"name_or_path": vision, "projection_dim": 8}, "projection_dim=8 is only for a model of two towers"),
    ]
    for settings, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            load_model_and_processor(**settings)


@pytest.mark.parametrize(
    ("side", "prepare", "message"),
    [
        ("vision", lambda folder: save_vision_tower(folder, "mae"), "stays the same from pass to pass"),
        (
            "vision",
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "the image processor of model.vision",
        ),
        ("vision", lambda folder: break_weights(folder, "layernorm"), "has no weights for .*layernorm.*random"),
        ("text", lambda folder: break_weights(folder, "LayerNorm"), "has no weights for .*LayerNorm.* more,.*random"),
        ("text", lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "the tokenizer of model.text"),
        ("text", lambda folder: save_text_tower(folder, sentence_pooling="pooling_mode_max_tokens"), "set model.text"),
        ("text", lambda folder: (folder / "modules.json").write_text("{"), "modules.json is not readable JSON"),
        ("text", lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter; merge it"),
    ],
)
def test_a_tower_that_would_train_something_else_is_refused(side, prepare, message, tmp_path):
    vision, text = save_vision_tower(tmp_path / "vision"), save_text_tower(tmp_path / "text")
    prepare(tmp_path / side)
    with pytest.raises((ValueError, OSError), match=message):
        load(vision, text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": None}, "vision_config is missing"),
        ({"text_pooling": "max"}, "text_pooling must be one of mean, cls, eot, pooler, got 'max'"),
        ({"vision_pooling": "eot"}, "vision_pooling must be one of pooler, cls, mean"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, got 0"),
    ],
)
def test_an_impossible_configuration_is_refused(fields, message):
    towers = {"vision_config": ViTConfig(**SQUARE), "text_config": PrecomputedFeaturesConfig(hidden_size=4)}
    with pytest.raises(ValueError, match=message):
        DualEncoderConfig(**(towers | fields))


def test_towers_that_are_at_hand_are_joined_without_a_copy():
    vision, text = ViTModel(ViTConfig(**SQUARE)), TEXT["distilbert"]()
    model = DualEncoder.of(vision, text, vision_size=32, text_size=32, vision_pooling="cls", text_pooling="eot")
    assert model.vision_model is vision and vision.pooler is None
    assert not any(weight.is_meta for weight in model.state_dict().values())
