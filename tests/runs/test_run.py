"""Recipes of every kind of data and model, carried out to the end."""

import io
import json
import logging
import sys
import tarfile

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from testing.tiny_recipe import STEPS, TOWER, tiny_recipe

from hf_dissect import make_scenes
from hf_dissect.data import make_scene_classes
from hf_dissect.recipe.recipe import DataSection
from hf_dissect.runs.evaluate import evaluate_checkpoint
from hf_dissect.runs.output_folder import choose_free_output_dir, replace_output_dir
from hf_dissect.runs.push_ledger import format_ledger_card
from hf_dissect.runs.run import build_trainer, load_data, run_recipe
from hf_dissect.runs.saved_model import load_split
from hf_dissect.selection.ledger import read_ledger

pytestmark = pytest.mark.usefixtures("drawn")
SCENES_ONLY = dict.fromkeys(["scenes_train", "scenes_validation", "scenes_test", "noise_rate"])
ONE_EPOCH = {"selection": {"strategy": "clipscore"}, "training": {"num_train_epochs": 1}}


def write_splits(folder, sizes=(("train", 48), ("validation", 12), ("test", 20)), captions_per_image=1):
    folder.mkdir()
    for split, size in sizes:
        make_scenes(size, split=split, captions_per_image=captions_per_image).to_parquet(folder / f"{split}.parquet")
    return folder


def test_folder_of_tables_with_several_captions_an_image(tmp_path):
    folder = write_splits(tmp_path / "data", captions_per_image=3)
    data = {**SCENES_ONLY, "source": "folder", "path": str(folder)}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, **ONE_EPOCH))
    assert metrics["num_pairs"] == 48 * 3 and metrics["steps"] == 48 * 3 // 16
    # The final figures are of the test split: of 20 images each has 3 captions among 60.
    assert metrics["final"]["image_to_text_median_rank"] <= 58
    assert "noise_kept" not in metrics["selection"] and "noise_detection_auroc" not in metrics["final"]


def test_noise_is_injected_into_the_training_split_only(tmp_path):
    folder = write_splits(tmp_path / "data")
    data = {**SCENES_ONLY, "source": "folder", "path": str(folder), "noise_rate": 0.25, "max_train_rows": 32}
    recipe = tiny_recipe(tmp_path / "run", data=data, **ONE_EPOCH)
    splits = load_data(recipe)
    assert sum(splits["train"]["clean"]) == 24 and "clean" not in splits["test"].column_names
    metrics = run_recipe(recipe, splits)
    assert metrics["selection"]["noise_candidates"] == 0.25 and metrics["final"]["noise_detection_num_mismatched"] == 8


def test_metrics_report_and_card_say_the_kind_of_noise(tmp_path):
    """An evaluation of the run meets the captions as they were."""
    data = {"scenes_train": 96, "noise_kind": "partial", "noise_rate": 0.25, "noise_seed": 3}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, **ONE_EPOCH))
    text = "25% of the training captions changed in one noun, seed 3"
    assert metrics["injected_noise"] == text and metrics["final"]["noise_detection_num_mismatched"] == 24
    assert (
        text in (tmp_path / "run" / "report.html").read_text() and text in (tmp_path / "run" / "README.md").read_text()
    )
    assert evaluate_checkpoint(str(tmp_path / "run"))["recall_sum"] == pytest.approx(metrics["final"]["recall_sum"])
    ledger = read_ledger(tmp_path / "run" / "ledger.safetensors")
    card = format_ledger_card(ledger, {"data": data}, "ada/scores")
    assert "the share 0.25 was changed in one noun on purpose" in card


def test_a_run_without_the_images_of_its_wrong_captions(tmp_path):
    """Of 96 rows 19 give their captions to 19 of the other 77; the test split has all of its rows."""
    data = {"scenes_train": 96, "noise_kind": "absent", "noise_rate": 0.25, "noise_seed": 3}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, **ONE_EPOCH))
    text = "25% of the training captions replaced by those of images that were left out, seed 3"
    assert metrics["num_pairs"] == 77 and metrics["injected_noise"] == text
    assert metrics["final"]["noise_detection_num_mismatched"] == 19
    assert (
        text in (tmp_path / "run" / "report.html").read_text() and text in (tmp_path / "run" / "README.md").read_text()
    )
    assert evaluate_checkpoint(str(tmp_path / "run"))["recall_sum"] == pytest.approx(metrics["final"]["recall_sum"])
    ledger = read_ledger(tmp_path / "run" / "ledger.safetensors")
    assert ledger.num_samples == 77
    card = format_ledger_card(ledger, {"data": data}, "ada/scores")
    assert "the share 0.25 was replaced by those of images that were left out on purpose" in card
    assert "numbered without those that were left out (`data.noise_kind: absent`, seed 3)" in card
    further = {**ONE_EPOCH, "data": data, "selection": {"ledger": str(tmp_path / "run"), "warmup_epochs": 0}}
    assert build_trainer(tiny_recipe(tmp_path / "second", **further)).ledger.num_samples == 77
    further["data"] = {**data, "noise_kind": "random"}
    with pytest.raises(ValueError, match=r"is of 77 pairs, the training data are 96: .*data\.noise_kind"):
        build_trainer(tiny_recipe(tmp_path / "third", **further)).train()


def test_image_folder(tmp_path):
    rows = make_scenes(32)
    (tmp_path / "pictures").mkdir()
    with open(tmp_path / "pictures" / "metadata.jsonl", "w") as metadata:
        for number, row in enumerate(rows):
            (tmp_path / "pictures" / f"{number}.png").write_bytes(row["image"]["bytes"])
            metadata.write(json.dumps({"file_name": f"{number}.png", "text": row["caption"]}) + "\n")
    data = {**SCENES_ONLY, "source": "imagefolder", "path": str(tmp_path / "pictures")}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, evaluation={"retrieval": False}, **ONE_EPOCH))
    assert metrics["num_pairs"] == 32 and metrics["final"] == {} and metrics["bad_rows"]["count"] == 0


@pytest.mark.parametrize("form", ["open_clip", "sidecars", "classes", "saved"])
def test_folders_as_others_leave_them(tmp_path, form):
    rows, folder = make_scenes(32), tmp_path / "data"
    (folder / "pictures" / "x").mkdir(parents=True)
    (folder / "pictures" / "y_z").mkdir()
    pictures = [f"pictures/{'y_z' if number % 2 else 'x'}/{number}.png" for number in range(32)]
    for picture, row in zip(pictures, rows, strict=True):
        (folder / picture).write_bytes(row["image"]["bytes"])
        if form == "sidecars":
            (folder / picture).with_suffix(".txt").write_text(row["caption"])
    columns = {}
    if form == "open_clip":
        lines = [
            f"{picture.replace('/', chr(92))}\t{row['caption']}" for picture, row in zip(pictures, rows, strict=True)
        ]
        (folder / "train.csv").write_text("\n".join(["filepath\ttitle", *lines, "pictures/gone.png\tNA"]))
        columns = {"image_column": "filepath", "caption_column": "title"}
    elif form == "saved":
        rows.save_to_disk(str(tmp_path / "saved"))
        folder = tmp_path / "saved"
    data = {**SCENES_ONLY, "source": "folder", "path": str(folder), **columns}
    selection = {**ONE_EPOCH["selection"], "max_bad_fraction": 0.1}
    given = {**ONE_EPOCH, "selection": selection, "evaluation": {"retrieval": False}}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, **given))
    missing = int(form == "open_clip")
    assert metrics["num_pairs"] == 32 + missing and metrics["bad_rows"]["count"] == missing


def test_streamed_tar_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard, split in enumerate(["train", "train", "validation"]):
        with tarfile.open(tmp_path / "shards" / f"{split}-{shard}.tar", "w") as tar:
            for number, row in enumerate(make_scenes(24, seed=shard)):
                for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{shard}{number:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    data = {
        **SCENES_ONLY,
        "source": "webdataset",
        "path": str(tmp_path / "shards"),
        "streaming": True,
        "id_column": "__key__",
    }
    recipe = tiny_recipe(
        tmp_path / "run",
        data=data,
        selection={"options": {"variant": "momentum"}, "record": True},
        training={"max_steps": 7, "eval_strategy": "steps", "eval_steps": 4},
    )
    metrics = run_recipe(recipe)
    assert metrics["steps"] == 7 and metrics["num_pairs"] is None and 0 < metrics["final"]["recall_sum"] <= 600
    # 48 pairs are three batches of 16: in seven steps every pair was seen, and has its history.
    ledger = load_file(tmp_path / "run" / "ledger.safetensors")
    assert sum(len(part) == 48 for part in ledger.values()) >= 2


def test_stored_image_features(tmp_path):
    folder, dim = write_splits(tmp_path / "data"), 6
    arrays = {
        split: np.random.default_rng(0).normal(size=(size, dim))
        for split, size in (("train", 48), ("validation", 12), ("test", 20))
    }
    np.savez(folder / "features.npz", **arrays)
    np.save(folder / "order.npy", np.concatenate([np.roll(np.arange(12), 1), np.arange(12, 48)]))
    model = {
        "config": {
            "model_type": "vision-text-dual-encoder",
            "projection_dim": 16,
            "vision_config": {"model_type": "precomputed_features", "hidden_size": dim},
            "text_config": {"model_type": "bert", **TOWER, "max_position_embeddings": 16},
        }
    }
    data = {
        **SCENES_ONLY,
        "source": "folder",
        "path": str(folder),
        "image_features": "features.npz",
        "noise_permutation": "order.npy",
    }
    metrics = run_recipe(tiny_recipe(tmp_path / "run", model=model, data=data, **ONE_EPOCH))
    assert metrics["num_pairs"] == 48 and metrics["selection"]["noise_candidates"] == 12 / 48
    assert metrics["final"]["recall_sum"] > 0 and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(("frozen", "other"), [("vision", "text"), ("text", "vision")])
def test_a_frozen_tower_keeps_its_weights(frozen, other, tmp_path):
    start = build_trainer(tiny_recipe(tmp_path / "start", model={"freeze": frozen})).model.state_dict()
    run_recipe(tiny_recipe(tmp_path / "run", model={"freeze": frozen}, training={"weight_decay": 0.1}))
    end = load_file(tmp_path / "run" / "model.safetensors")
    changed = {name for name, weight in end.items() if not torch.equal(weight, start[name])}
    assert not [name for name in changed if name.startswith(f"{frozen}_model.")]
    assert [name for name in changed if name.startswith(f"{other}_model.")] and "logit_scale" in changed


def test_a_trained_model_is_trained_on(tmp_path):
    run_recipe(tiny_recipe(tmp_path / "first"))
    model = {"config": None, "vocab_size": None, "name_or_path": str(tmp_path / "first")}
    recipe = tiny_recipe(tmp_path / "second", model=model, training={"learning_rate": 0.0})
    assert run_recipe(recipe)["steps"] == STEPS
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_zero_shot_figures_of_the_scenes(tmp_path):
    classes = make_scene_classes(1).features["label"].names
    evaluation = {"zero_shot": {"classes": classes, "templates": ["a {}"]}, "retrieval": False}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data={"scenes_test": 50}, evaluation=evaluation, **ONE_EPOCH))
    assert metrics["final"]["zero_shot_num_images"] == 50 and 0 <= metrics["final"]["zero_shot_accuracy@1"] <= 1
    assert "recall_sum" not in metrics["final"]


def test_the_start_depends_on_the_seed_alone(tmp_path):
    def start(seed, strategy="dissect"):
        torch.rand(seed + 5)  # whatever ran before in this process
        recipe = tiny_recipe(tmp_path / "run", selection={"strategy": strategy}, training={"seed": seed})
        return torch.cat([weight.flatten() for weight in build_trainer(recipe).model.state_dict().values()])

    assert torch.equal(start(0), start(0, "none")) and not torch.equal(start(0), start(1))


def test_a_run_moves_to_a_free_folder(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path / "a: b")
    assert choose_free_output_dir(recipe) is recipe
    (tmp_path / "a: b" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "a: b-2").mkdir()
    (tmp_path / "a: b-2" / "metrics.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert choose_free_output_dir(recipe).output_dir == str(tmp_path / "a: b-3")
    assert "already holds a run" in caplog.text
    assert replace_output_dir(recipe, tmp_path).output_dir == str(tmp_path) and recipe.output_dir == str(
        tmp_path / "a: b"
    )


def test_one_split_of_data(tmp_path, caplog):
    write_splits(tmp_path / "data", (("train", 4), ("test", 2)))
    Dataset.from_dict({"caption": ["x"]}).to_parquet(tmp_path / "one.parquet")
    parts, whole = (DataSection(source="folder", path=str(tmp_path / name)) for name in ("data", "one.parquet"))
    assert len(load_split(parts, "test")) == 2
    with pytest.raises(ValueError, match="split 'validation': the data have train, test; name one of these"):
        load_split(parts, "validation")
    with caplog.at_level(logging.WARNING):
        assert len(load_split(whole, "test")) == 1
    assert "no split 'test'; all of them are evaluated" in caplog.text
    with pytest.raises(ValueError, match="split 'test'"):
        load_split(whole, "test", whole=False)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"training\.report_to=\['wandb'\]: .*pip install wandb"):
        build_trainer(tiny_recipe(tmp_path, training={"report_to": "wandb"}))
