"""Recipes of two trained towers: they train, evaluate, resume, and say beforehand what does not go together."""

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import tiny_models
from testing.tiny_recipe import STEPS, tiny_settings
from testing.trained_towers import save_text_tower, save_vision_tower
from transformers import AutoModel

from hf_dissect.data import make_scenes
from hf_dissect.evaluation.zero_shot_classifier import class_embeddings
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.recipe.recipe import Recipe, RecipeError
from hf_dissect.runs.audit import audit
from hf_dissect.runs.evaluate import evaluate_checkpoint
from hf_dissect.runs.run import build_trainer, run_recipe

SIZES = {"train": 48, "validation": 12, "test": 20}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return {
        "vision": {"name_or_path": save_vision_tower(folder / "vision")},
        "text": {"name_or_path": save_text_tower(folder / "text")},
        "projection_dim": 16,
    }


def make_recipe(output_dir, model: dict, **sections) -> Recipe:
    settings = tiny_settings(**sections)
    settings["model"] = model
    settings["training"]["output_dir"] = str(output_dir)
    return Recipe.from_dict(settings)


def write_features(folder) -> dict:
    """Write scenes with two captions each, and stored features of both sides; return the section `data`."""
    folder.mkdir()
    for split, size in SIZES.items():
        rows = make_scenes(size, split=split)
        captions = [[caption, f"{caption} again"] for caption in rows["caption"]]
        rows.remove_columns("caption").add_column("captions", captions).to_parquet(folder / f"{split}.parquet")
    random = np.random.default_rng(0)
    for name, count, dim in (("image", 1, 6), ("text", 2, 5)):
        np.savez(folder / f"{name}.npz", **{split: random.normal(size=(count * n, dim)) for split, n in SIZES.items()})
    unused = dict.fromkeys(("scenes_train", "scenes_validation", "scenes_test"))
    return {**unused, "source": "folder", "path": str(folder)}


def check_figures(folder, metrics: dict, pairs: int) -> None:
    """The saved model gives the figures of the run, and can audit."""
    assert evaluate_checkpoint(str(folder))["recall_sum"] == pytest.approx(metrics["final"]["recall_sum"])
    result = audit(str(folder), output_dir=folder.parent / "audit")
    assert len(result.table) == pairs


@pytest.mark.parametrize(
    ("changes", "sections"),
    [
        ({"freeze": "vision"}, {}),
        ({"text": "t5", "vision": "resnet"}, {}),
        ({}, {"adapter": {"type": "lora", "r": 2}}),
        ({"freeze": "vision"}, {"adapter": {"type": "mola", "variant": "router", "num_experts": 2, "r": 2}}),
    ],
)
def test_a_run_of_two_towers(changes, sections, towers, tmp_path):
    model = {**towers, **changes}
    if "text" in changes:
        model["text"] = {"name_or_path": save_text_tower(tmp_path / "t", changes["text"])}
        model["vision"] = {"name_or_path": save_vision_tower(tmp_path / "v", changes["vision"])}
    metrics = run_recipe(make_recipe(tmp_path / "run", model, **sections))
    assert metrics["steps"] == STEPS
    check_figures(tmp_path / "run", metrics, 64)
    if not sections:
        assert type(AutoModel.from_pretrained(tmp_path / "run")).__name__ == "DualEncoder"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Its towers were trained before: a local model for the images, a local model for the captions." in card
    assert "import hf_dissect  # makes the model's type known to transformers" in card and str(tmp_path) not in card
    assert "temporary" not in card and towers["text"]["name_or_path"] not in card
    if changes.get("freeze") and not sections:
        start = AutoModel.from_pretrained(towers["vision"]["name_or_path"]).state_dict()
        end = AutoModel.from_pretrained(tmp_path / "run").vision_model.state_dict()
        assert all(torch.equal(end[name], value) for name, value in start.items())


@pytest.mark.parametrize("stored", [("vision",), ("text",), ("vision", "text")])
def test_a_run_on_stored_features(stored, towers, tmp_path):
    data = write_features(tmp_path / "data") | {"noise_rate": 0.25}
    data |= {"image_features": "image.npz"} if "vision" in stored else {}
    data |= {"text_features": "text.npz"} if "text" in stored else {}
    model = {**towers, **{side: {"features": True} for side in stored}}
    metrics = run_recipe(make_recipe(tmp_path / "run", model, data=data))
    assert metrics["num_pairs"] == 2 * SIZES["train"]
    check_figures(tmp_path / "run", metrics, 2 * SIZES["train"])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert not any(name.startswith(tuple(f"{side}_model." for side in stored)) for name in saved)
    if "text" in stored:
        with pytest.raises(ValueError, match="reads stored features of captions .5 numbers each.*--classes"):
            class_embeddings(*load_model_and_processor(name_or_path=str(tmp_path / "run")), ["a"], ["a {}"])


def test_two_networks_of_the_same_towers_differ_in_their_projections(towers, tmp_path):
    recipe = make_recipe(tmp_path, towers, objective={"gsc": {"dual": True}}, selection={"strategy": "none"})
    first, second = build_trainer(recipe).model.networks
    assert not torch.equal(first.text_projection.weight, second.text_projection.weight)
    assert torch.equal(next(first.text_model.parameters()), next(second.text_model.parameters()))
    assert run_recipe(recipe)["steps"] == STEPS


@pytest.mark.parametrize("kind", ["two towers", "a saved dual encoder"])
def test_a_resumed_run_has_the_weights_of_its_checkpoint(kind, towers, tmp_path):
    """Also those of a ViT, which transformers saves under former names."""
    model = towers
    if kind == "a saved dual encoder":
        saved, processor = tiny_models.tiny_dual_encoder()
        saved.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        model = {"name_or_path": str(tmp_path / "model")}
    recipe = make_recipe(tmp_path / "run", model, training={"save_strategy": "steps", "save_steps": 4})
    run_recipe(recipe)
    whole = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / "model.safetensors").unlink()
    run_recipe(recipe, resume=True)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"vision": {"features": True}}, {}, "model.vision.features is true, but the data have no stored features of"),
        ({"text": {"features": True}}, {}, "model.text.features is true.*name a .npz file with data.text_features"),
        ({}, {"image_features": "image.npz"}, "the data hold feature vectors of 6 numbers.*reads pictures"),
    ],
)
def test_data_that_do_not_fit_the_towers_are_refused(model, data, message, towers, tmp_path):
    recipe = make_recipe(tmp_path / "run", {**towers, **model}, data=write_features(tmp_path / "data") | data)
    with pytest.raises(ValueError, match=message):
        build_trainer(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (
            {"model": {"vision": {"timm": "x"}}},
            ["model.text: missing; a dual encoder needs model.vision and model.text"],
        ),
        (
            {"model": {"vision": {}, "text": {"features": True}}},
            ["model.vision: missing; set one of name_or_path, timm"],
        ),
        (
            {"model": {"vision": {"timm": "x", "features": True}, "text": {"name_or_path": "y"}}},
            ["model.vision.features: model.vision.timm and model.vision.features are both set; keep one"],
        ),
        (
            {"model": {"vision": {"timn": "x"}, "text": {"pooling": "max", "name_or_path": "y"}}},
            ["model.vision.timn: unknown key .*did you mean 'timm'", "model.text.pooling: 'max' is not allowed"],
        ),
        (
            {"model": {"name_or_path": "z", "vision": {"timm": "x"}, "text": {"name_or_path": "y"}}},
            ["model.name_or_path: 'z' does not go with two towers"],
        ),
        (
            {"model": {"vision": {"timm": "x"}, "text": {"name_or_path": "y"}, "trust_remote_code": True}},
            ["model.trust_remote_code: true does not go with two towers"],
        ),
        (
            {"model": {"config": {"model_type": "clip"}, "projection_dim": 8}},
            ["model.projection_dim: 8 is only for a model of vision and text; .*model.config.projection_dim"],
        ),
        (
            {"model": {"vision": {"timm": "x"}, "text": {"name_or_path": "y"}}, "data": {"text_features": "t.npz"}},
            ["data.text_features: 't.npz' would not be read; set model.text.features to true"],
        ),
        (
            {
                "model": {"vision": {"timm": "x"}, "text": {"features": True, "pooling": "cls"}},
                "evaluation": {"zero_shot": {"classes": ["a", "b"]}},
            },
            ["model.text.pooling: 'cls' does not go with stored features", "evaluation.zero_shot: needs a text tower"],
        ),
        (
            {
                "model": {"vision": {"timm": "x"}, "text": {"features": True}},
                "data": {"streaming": True, "text_features": "t.npz"},
                "training": {"max_steps": 5},
            },
            ["data.text_features: 't.npz' needs rows in a fixed order; set data.streaming to false"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, faults):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"name": "small", **settings})
    for fault, found in zip(faults, caught.value.faults, strict=True):
        assert re.match(fault, found), found


def test_a_published_recipe_keeps_towers_of_the_hub_and_no_paths(tmp_path):
    from hf_dissect.hub.shared_recipe import select_shareable

    settings = {
        "model": {"vision": {"name_or_path": str(tmp_path)}, "text": {"name_or_path": "sentence-transformers/x"}},
        "data": {"text_features": str(tmp_path / "text.npz")},
    }
    shared, left_out = select_shareable(settings)
    assert shared["model"] == {"vision": {"name_or_path": None}, "text": {"name_or_path": "sentence-transformers/x"}}
    assert left_out == ["model.vision.name_or_path", "data.text_features"] and shared["data"] == {
        "text_features": "text.npz"
    }


def test_a_saved_run_is_trained_on_and_gives_its_towers(towers, tmp_path):
    run_recipe(make_recipe(tmp_path / "first", towers, training={"max_steps": 1}))
    model, _ = load_model_and_processor(name_or_path=str(tmp_path / "first"))
    again = {side: {"name_or_path": str(tmp_path / "first")} for side in ("vision", "text")}
    taken, _ = load_model_and_processor(**again, projection_dim=16)
    assert torch.equal(
        taken.text_model.embeddings.word_embeddings.weight, model.text_model.get_input_embeddings().weight
    )
