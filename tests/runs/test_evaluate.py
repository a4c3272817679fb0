"""Figures of saved models, on the data of their run and on others."""

import numpy as np
import pytest
import torch
from testing import tiny_models
from testing.tiny_recipe import tiny_recipe, tiny_settings

from hf_dissect import load_model_and_processor, make_scenes
from hf_dissect.data import make_scene_classes
from hf_dissect.data.images import decode_image
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.runs.evaluate import evaluate_checkpoint
from hf_dissect.runs.run import run_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, its metrics, and a checkpoint inside."""
    folder = tmp_path_factory.mktemp("run")
    classes = make_scene_classes(1).features["label"].names
    evaluation = {"zero_shot": {"classes": classes, "templates": ["a {}"]}}
    return folder, run_recipe(tiny_recipe(folder, evaluation=evaluation, training={"save_strategy": "epoch"}))


def test_a_run_on_its_own_data_gives_the_figures_of_its_end(run):
    folder, metrics = run
    for checkpoint in (folder, folder / "checkpoint-8"):
        figures = evaluate_checkpoint(str(checkpoint), batch_size=24)
        assert figures.keys() == {key for key in metrics["final"] if not key.startswith("noise_detection")}
        assert figures == pytest.approx({key: metrics["final"][key] for key in figures}, abs=1e-5)


def test_recall_is_counted_from_the_embeddings(run):
    rows = make_scenes(24, split="test")
    model, processor = load_model_and_processor(name_or_path=str(run[0]))
    inputs = processor(
        text=list(rows["caption"]),
        images=[decode_image(image) for image in rows["image"]],
        return_tensors="pt",
        padding=True,
        truncation=True,
    )
    with torch.no_grad():
        similarity = model(**inputs).logits_per_image
    own = similarity.diagonal()
    figures = evaluate_checkpoint(str(run[0]))
    for name, ranks in {
        "image_to_text": (similarity > own[:, None]).sum(1),
        "text_to_image": (similarity > own[None, :]).sum(0),
    }.items():
        for k in (1, 5, 10):
            assert figures[f"{name}_R@{k}"] == pytest.approx(100 * (ranks < k).float().mean().item(), abs=1e-3)


def test_rows_can_be_limited_and_columns_named(run, tmp_path):
    rows = make_scenes(30, split="test").rename_columns({"image": "photo", "caption": "alt"})
    rows.to_parquet(tmp_path / "x.parquet")
    named = {"data": str(tmp_path / "x.parquet"), "image_column": "photo", "caption_column": "alt"}
    assert evaluate_checkpoint(str(run[0]), **named, max_rows=5)["image_to_text_R@5"] == 100
    assert evaluate_checkpoint(str(run[0]), **named)["image_to_text_R@5"] < 100


def test_labelled_images_with_names_of_their_own_or_given(run, tmp_path):
    rows = make_scene_classes(48)
    rows.to_parquet(tmp_path / "named.parquet")
    names = rows.features["label"].names
    own = evaluate_checkpoint(str(run[0]), data=str(tmp_path / "named.parquet"), templates=["a {}"])
    assert own["zero_shot_num_images"] == 48 and not any(key.startswith("image_to") for key in own)
    as_text = [names[label] for label in rows["label"]]
    rows.remove_columns("label").add_column("kind", as_text).to_parquet(tmp_path / "text.parquet")
    given = evaluate_checkpoint(
        str(run[0]), data=str(tmp_path / "text.parquet"), classes=names, label_column="kind", templates=["a {}"]
    )
    assert given == pytest.approx(own)


def test_unreadable_rows_do_not_stop_an_evaluation(run, tmp_path):
    rows = make_scenes(8, split="test")
    broken = [{**row, "image": {"bytes": b"", "path": None}} if place == 2 else row for place, row in enumerate(rows)]
    type(rows).from_list(broken, features=rows.features).to_parquet(tmp_path / "x.parquet")
    assert evaluate_checkpoint(str(run[0]), data=str(tmp_path / "x.parquet"))["image_to_text_R@10"] == 100


def test_a_model_on_stored_features(tmp_path):
    make_scenes(10).to_parquet(tmp_path / "x.parquet")
    np.savez(tmp_path / "features.npz", train=np.random.default_rng(1).normal(size=(10, 6)).astype(np.float32))
    settings = {
        "config": {
            "model_type": "vision-text-dual-encoder",
            "projection_dim": 8,
            "vision_config": {"model_type": "precomputed_features", "hidden_size": 6},
            "text_config": tiny_settings()["model"]["config"]["text_config"] | {"model_type": "bert"},
        },
        "captions": make_scenes(64)["caption"],
        "vocab_size": 600,
    }
    model, processor = load_model_and_processor(**settings)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    figures = evaluate_checkpoint(
        str(tmp_path / "model"), data=str(tmp_path / "x.parquet"), image_features=str(tmp_path / "features.npz")
    )
    assert figures["text_to_image_R@10"] == 100


def test_a_model_that_was_trained_elsewhere(tmp_path):
    model, processor = tiny_models.tiny_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert 0 < evaluate_checkpoint(str(tmp_path), data="scenes", max_rows=40)["recall_sum"] < 600
    with pytest.raises(ValueError, match="has no recipe.yaml to take the data from; name the data with --data"):
        evaluate_checkpoint(str(tmp_path))


def test_data_that_allow_no_figures_are_refused(run, tmp_path):
    make_scene_classes(4).remove_columns("label").to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="neither captions nor labels with class names .columns: image, held_out"):
        evaluate_checkpoint(str(run[0]), data=str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="split 'dev': the data have train, validation, test"):
        evaluate_checkpoint(str(run[0]), split="dev")


def test_a_run_without_a_test_split_is_not_evaluated_on_its_training_pairs(run, tmp_path):
    make_scenes(20).to_parquet(tmp_path / "x.parquet")
    recipe = Recipe.load(run[0] / "recipe.yaml").to_dict()
    recipe["data"] |= {"source": "folder", "path": str(tmp_path / "x.parquet")}
    recipe["evaluation"]["zero_shot"] = None
    model, processor = load_model_and_processor(name_or_path=str(run[0]))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Recipe.from_dict(recipe).save(tmp_path / "model" / "recipe.yaml")
    with pytest.raises(ValueError, match="split 'test': the data have train; name one of these with --split"):
        evaluate_checkpoint(str(tmp_path / "model"))
    assert evaluate_checkpoint(str(tmp_path / "model"), split="train")["recall_sum"] > 0
