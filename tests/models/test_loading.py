"""Loading models, refusing what cannot be loaded, and telling checkpoints of other models apart."""

import json
import shutil

import pytest
import torch
from testing import tiny_models
from testing.tiny_models import CAPTIONS, FAMILIES, Wrapper, tiny_configs, tiny_inputs, with_lora
from transformers import AutoModel, AutoProcessor

from hf_dissect.models.loading import check_dual_encoder, check_same_architecture, load_model_and_processor

TEXT = tiny_models.TRANSFORMER
VISION = tiny_configs()["clip"]["vision_config"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_its_processor_and_computes_the_same(family, tmp_path):
    model, processor = getattr(tiny_models, family)()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_model_and_processor(name_or_path=str(tmp_path))
    check_dual_encoder(loaded)
    with torch.no_grad():
        expected = model(**tiny_inputs(model, processor, CAPTIONS[:4]))
        found = loaded(**tiny_inputs(loaded, loaded_processor, CAPTIONS[:4]))
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    assert not loaded.training
    assert type(loaded) is type(model)
    check_same_architecture(loaded, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of name_or_path and config"),
        ({"name_or_path": "x", "config": {}}, "exactly one of name_or_path and config"),
        ({"config": {"model_type": "bert"}}, "model_type is one of clip, siglip.*got 'bert'"),
        ({"config": {}}, "model_type is one of clip.*got None"),
        ({"config": {"model_type": "clip"}}, "captions.*model.tokenizer"),
        ({"config": {"model_type": "clip"}, "captions": []}, "captions holds no text"),
        ({"config": {"model_type": "clip"}, "captions": [None, " ", 3]}, "captions holds no text"),
        ({"config": {"model_type": "clip"}, "captions": CAPTIONS, "vocab_size": 100}, "at least 514.*got 100"),
        ({"config": {"model_type": "clip"}, "captions": CAPTIONS, "max_caption_length": 2}, "at least 3.*got 2"),
        ({"config": {"model_type": "clip", "projektion_dim": 8}}, "unknown key 'projektion_dim'.*projection_dim"),
        ({"config": {"model_type": "clip", "text_config": {"hiden_size": 8}}}, "config.text_config.*'hiden_size'"),
        ({"config": {"model_type": "clip", "text_config": 7}}, "config.text_config must be a mapping.*got 7"),
        (
            {"config": {"model_type": "clip", "vision_config": {"hidden_size": "wide"}}, "captions": CAPTIONS},
            "impossible value.*hidden_size",
        ),
        (
            {"config": {"model_type": "clip", "text_config": {"hidden_size": 30}}, "captions": CAPTIONS},
            "impossible value.*hidden size .30. is not a multiple",
        ),
        (
            {
                "config": {
                    "model_type": "siglip",
                    "vision_config": VISION,
                    "text_config": {**TEXT, "projection_size": 8},
                },
                "captions": CAPTIONS,
            },
            "image embeddings have 32 dimensions and text embeddings 8",
        ),
        (
            {"config": {"model_type": "vision-text-dual-encoder", "text_config": {"model_type": "bert"}}},
            "config.vision_config.model_type must name.*precomputed_features.*got None",
        ),
    ],
)
def test_an_impossible_model_section_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model_and_processor(**arguments)


def test_too_long_captions_are_refused(tiny_clip, tmp_path):
    for part in tiny_clip:
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"max_caption_length must be at most {tiny_models.MAX_LENGTH}.*got 17"):
        load_model_and_processor(name_or_path=str(tmp_path), max_caption_length=17)
    _, processor = load_model_and_processor(name_or_path=str(tmp_path), max_caption_length=5)
    assert processor.tokenizer.model_max_length == 5


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_dual_encoder, tmp_path):
    for part in tiny_dual_encoder:
        part.save_pretrained(tmp_path / "model")
    tiny_models.clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, but the model's text tower knows only"):
        load_model_and_processor(name_or_path=str(tmp_path / "model"), tokenizer=str(tmp_path / "tokenizer"))


def test_a_model_that_is_nowhere_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(OSError, match="name_or_path 'no-one/no-model'.*no such local folder.*HF_HUB_OFFLINE"):
        load_model_and_processor(name_or_path="no-one/no-model")
    with pytest.raises(OSError, match="no such local folder"):
        load_model_and_processor(name_or_path=str(tmp_path / "absent"))
    with pytest.raises(OSError, match="without a config.json"):
        load_model_and_processor(name_or_path=str(tmp_path))
    with pytest.raises(OSError, match="tokenizer 'no-one/no-tokenizer'"):
        load_model_and_processor(config=tiny_configs()["clip"], tokenizer="no-one/no-tokenizer")


def test_broken_model_folders_are_refused_by_name(tiny_clip, tmp_path):
    good = tmp_path / "good"
    for part in tiny_clip:
        part.save_pretrained(good)
    unknown = shutil.copytree(good, tmp_path / "unknown")
    config = json.loads((good / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "clap_of_thunder"}))
    with pytest.raises(ValueError, match="unknown.*clap_of_thunder"):
        load_model_and_processor(name_or_path=str(unknown))
    truncated = shutil.copytree(good, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="truncated.*wrote the folder completely"):
        load_model_and_processor(name_or_path=str(truncated))
    garbled = shutil.copytree(good, tmp_path / "garbled")
    (garbled / "config.json").write_text("{not json")
    with pytest.raises(OSError, match="garbled"):
        load_model_and_processor(name_or_path=str(garbled))
    bare = tmp_path / "bare"
    tiny_clip[0].save_pretrained(bare)
    with pytest.raises((OSError, ValueError), match="image processor of name_or_path.*bare"):
        load_model_and_processor(name_or_path=str(bare))


def test_parts_saved_without_a_processor_are_put_together(tiny_dual_encoder, tmp_path):
    model, processor = tiny_dual_encoder
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    _, loaded = load_model_and_processor(name_or_path=str(tmp_path))
    batch, again = (tiny_inputs(model, each, CAPTIONS[:4]) for each in (processor, loaded))
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoProcessor.from_pretrained(tmp_path / "again").tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_weights_are_loaded_in_float32_whatever_they_were_saved_in(tiny_clip, tmp_path):
    model, processor = tiny_clip
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model_and_processor(name_or_path=str(tmp_path))[0].dtype == torch.float32


def test_a_checkpoint_of_another_model_is_refused(tiny_clip, tiny_siglip, tmp_path):
    model, _ = tiny_clip
    model.save_pretrained(tmp_path / "clip")
    check_same_architecture(Wrapper(model), tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a model of type clip.*is of type siglip"):
        check_same_architecture(tiny_siglip[0], tmp_path / "clip")
    wider, _ = load_model_and_processor(
        config=tiny_configs()["clip"], captions=CAPTIONS, vocab_size=700, max_caption_length=16
    )
    message = (
        r"is of another model: it has text_model.embeddings.token_embedding.weight \[\d+, 32\] where.*\[\d+, 32\]"
    )
    with pytest.raises(ValueError, match=message):
        check_same_architecture(wider, tmp_path / "clip")


def test_a_checkpoint_in_several_files_is_read_as_one(tiny_clip, tmp_path):
    tiny_clip[0].save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check_same_architecture(tiny_clip[0], tmp_path)


def test_a_checkpoint_that_is_not_whole_is_refused(tiny_clip, tmp_path):
    with pytest.raises(OSError, match="no readable config.json"):
        check_same_architecture(tiny_clip[0], tmp_path)
    tiny_clip[0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(OSError, match="model.safetensors.*cannot be read"):
        check_same_architecture(tiny_clip[0], tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="has no model.safetensors"):
        check_same_architecture(tiny_clip[0], tmp_path)


def test_an_adapter_folder_is_left_to_peft(tiny_clip, tmp_path):
    adapted = with_lora(tiny_clip[0])
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert check_same_architecture(adapted, tmp_path) is None
