"""The files by which sentence-transformers loads a run folder, without its package."""

import json

import pytest
from testing import tiny_models
from testing.tiny_models import tiny_clip, with_lora, with_mola
from testing.tiny_recipe import tiny_recipe
from transformers import AutoModel, AutoProcessor

from hf_dissect import TwinDualEncoder
from hf_dissect.interop.sentence_files import OWN_ENCODER, describe_encoder, find_hindrance
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.runs.run import run_recipe

FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_models_of_transformers_need_no_code_of_ours(family):
    model, processor = getattr(tiny_models, family)()
    assert find_hindrance(model) is None
    modules, whole, settings = describe_encoder(model, processor).values()
    assert [(module["path"], module["type"].rpartition(".")[2]) for module in modules] == [
        ("", "Transformer"),
        ("1_Normalize", "Normalize"),
    ]
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert settings["modality_config"]["image"] == {
        "method": "get_image_features",
        "method_output_name": "pooler_output",
    }
    padded = settings.get("processing_kwargs", {}).get("text", {})
    length = processor.tokenizer.model_max_length
    if family in ("tiny_siglip", "tiny_siglip2"):
        assert padded == {"padding": "max_length", "truncation": True, "max_length": length}
    elif family == "tiny_align":  # whose processor pads to 64 by itself
        assert padded == {"padding": "longest", "truncation": True, "max_length": length}
    else:
        assert padded == {}
    patches = settings.get("processing_kwargs", {}).get("image")
    assert patches == ({"max_num_patches": 4} if family == "tiny_siglip2" else None)
    assert whole["model_type"] == "SentenceTransformer"


def test_what_needs_code_of_ours_names_it():
    named = tiny_clip()[0]
    named.name_or_path = "ada/clip"
    assert find_hindrance(with_lora(named)) is None
    assert "base model lies in the same folder" in find_hindrance(with_lora(tiny_clip()[0]))
    assert "type MOLA" in find_hindrance(with_mola(named.__class__(named.config)))
    twins = TwinDualEncoder.of(tiny_clip(0)[0], tiny_clip(1)[0])
    assert "TwinDualEncoder" in find_hindrance(twins)
    modules, _, settings = describe_encoder(twins, tiny_clip()[1]).values()
    assert modules[0]["type"] == OWN_ENCODER
    assert settings["modality_config"]["text"]["method_output_name"] is None


def test_without_a_processor_of_both_nothing_is_written():
    model, processor = tiny_clip()
    assert describe_encoder(model, processor.tokenizer) == describe_encoder(model, None) == {}


def test_a_run_folder_has_the_files_and_loads_as_before(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", training={"save_strategy": "epoch"})
    run_recipe(recipe)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-8"):
        assert all((folder / name).is_file() for name in FILES)
        assert type(AutoModel.from_pretrained(folder)).__name__ == "CLIPModel"
        assert type(AutoProcessor.from_pretrained(folder)).__name__ == "CLIPProcessor"
        assert load_model_and_processor(name_or_path=str(folder))[0].config.model_type == "clip"
    assert str(tmp_path) not in "".join((tmp_path / "run" / name).read_text() for name in FILES)
    assert json.loads((tmp_path / "run" / "modules.json").read_text())[0]["path"] == ""
