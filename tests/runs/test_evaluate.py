"""Figures of saved models, on the data of their run and on others."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from datasets import Image, Value
from testing import tiny_models
from testing.tiny_recipe import tiny_recipe, tiny_settings

from hf_dissect import load_model_and_processor, make_scenes
from hf_dissect.cli import main
from hf_dissect.data import make_scene_classes
from hf_dissect.data.images import decode_image
from hf_dissect.evaluation import class_embeddings, evaluate_zero_shot
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
    save_feature_model(tmp_path / "model")
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


def save_scene_classes(folder, **columns):
    """Labelled pictures with integer labels in `columns["label"]` and pictures in `columns["image"]`."""
    rows = make_scene_classes(24)
    names = rows.features["label"].names
    rows = rows.cast_column("label", Value("int64")).rename_columns(columns)
    folder.mkdir()
    rows.to_parquet(folder / "x.parquet")
    return rows, names


def write_shards(folder, rows, captions=False):
    folder.mkdir()
    with tarfile.open(folder / "x-000.tar", "w") as archive:
        for place, row in enumerate(rows):
            members = {"png": row["image"]["bytes"], "json": json.dumps({"label": row["label"]}).encode()}
            if captions:
                members["txt"] = b"a caption"
            for name, content in members.items():
                info = tarfile.TarInfo(f"{place:04}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_labelled_images_are_found_whatever_the_source_and_the_names(run, tmp_path):
    rows, names = save_scene_classes(tmp_path / "table")
    given = {"classes": names, "templates": ["a {}"]}
    expected = evaluate_checkpoint(str(run[0]), data=str(tmp_path / "table"), **given)
    assert expected["zero_shot_num_images"] == 24 and "loss" not in expected
    save_scene_classes(tmp_path / "named", image="img", label="category")
    save_scene_classes(tmp_path / "odd", image="photo", label="kind")
    write_shards(tmp_path / "shards", rows)
    (tmp_path / "pictures").mkdir()
    for place, row in enumerate(rows):
        (tmp_path / "pictures" / f"{place}.png").write_bytes(row["image"]["bytes"])
    lines = [f"{place}.png,{row['label']}" for place, row in enumerate(rows)]
    (tmp_path / "pictures" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    places = {
        "named": {},
        "odd": {"image_column": "photo", "label_column": "kind"},
        "shards": {},
        "shards/x-000.tar": {},
        "pictures": {},
    }
    for place, columns in places.items():
        found = evaluate_checkpoint(str(run[0]), data=str(tmp_path / place), **columns, **given)
        assert found == pytest.approx(expected), place


def test_a_stream_is_classified_by_its_first_rows(run, tmp_path):
    rows, names = save_scene_classes(tmp_path / "table")
    recipe = Recipe.load(run[0] / "recipe.yaml").to_dict()
    recipe["data"] |= {"source": "folder", "path": str(tmp_path / "table"), "streaming": True}
    recipe["evaluation"]["zero_shot"] = None
    model, processor = load_model_and_processor(name_or_path=str(run[0]))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    recipe["data"] |= {"noise_rate": 0.0}
    recipe["training"] |= {"max_steps": 2}
    Recipe.from_dict(recipe).save(tmp_path / "model" / "recipe.yaml")
    given = {"split": "train", "classes": names}
    with pytest.raises(ValueError, match=r"a stream \(data.streaming\).*name it with --max-rows"):
        evaluate_checkpoint(str(tmp_path / "model"), **given)
    assert evaluate_checkpoint(str(tmp_path / "model"), **given, max_rows=10)["zero_shot_num_images"] == 10


def test_what_is_wrong_with_the_classes_is_said_before_the_model_is_loaded(run, tmp_path):
    rows, names = save_scene_classes(tmp_path / "table")
    data = {"data": str(tmp_path / "table")}
    wrong = {
        r"labels of 'label' are not classes, first": {"classes": names[:3]},
        r"template": {"classes": names, "templates": ["a photo"]},
        r"image_column is 'photo', but the dataset has": {"classes": names, "image_column": "photo"},
        r"label_column is 'kind', but the dataset has": {"classes": names, "label_column": "kind"},
        r"--label-column 'label' does not name its classes.*with --classes": {"label_column": "label"},
        r"--label-column 'kind' is not a column; the data have image, ": {"label_column": "kind"},
        r"task_column is 'style', but the dataset has": {"classes": names, "task_column": "style"},
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            evaluate_checkpoint(str(tmp_path / "no model"), **data, **settings)


def test_stored_features_are_classified(tmp_path):
    rows, names = save_scene_classes(tmp_path / "table")
    features = np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32)
    np.savez(tmp_path / "features.npz", train=features)
    model, processor = save_feature_model(tmp_path / "model")
    found = evaluate_checkpoint(
        str(tmp_path / "model"),
        data=str(tmp_path / "table"),
        image_features=str(tmp_path / "features.npz"),
        classes=names,
        templates=["a {}"],
    )
    with torch.no_grad():
        images = model.get_image_features(pixel_values=torch.from_numpy(features)).pooler_output
    nearest = (images @ class_embeddings(model, processor, names, ["a {}"]).T).argmax(1)
    assert found["zero_shot_accuracy@1"] == pytest.approx(np.mean(nearest.numpy() == np.array(rows["label"])))


def save_feature_model(folder):
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
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_tasks_of_an_adapter_are_those_of_its_training(run, tmp_path):
    model, processor = load_model_and_processor(name_or_path=str(run[0]))
    model = tiny_models.with_mola(model, "grad", num_experts=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mola_B" in name:
                weight.normal_(std=1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(run[0])
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "tasks.json").write_text('["oil", "ink", "chalk"]')  # not in the order of the alphabet
    rows, names = save_scene_classes(tmp_path / "table")
    tasks = np.random.default_rng(0).integers(0, 3, 24)
    styled = rows.add_column("style", [["oil", "ink", "chalk"][task] for task in tasks])
    (tmp_path / "styled").mkdir()
    styled.to_parquet(tmp_path / "styled" / "x.parquet")
    given = {"classes": names, "templates": ["a {}"]}
    found = evaluate_checkpoint(str(tmp_path / "model"), data=str(tmp_path / "styled"), task_column="style", **given)
    numbered = rows.add_column("number", tasks.tolist())
    saved, processor = load_model_and_processor(name_or_path=str(tmp_path / "model"))
    expected = evaluate_zero_shot(saved, processor, numbered, names, ["a {}"], task_column="number")
    assert found == pytest.approx({f"zero_shot_{key}": value for key, value in expected.items()})
    mean = evaluate_checkpoint(str(tmp_path / "model"), data=str(tmp_path / "styled"), **given)
    assert mean != pytest.approx(found)


def test_figures_are_reported_as_they_come_and_kept_when_a_later_part_fails(run, tmp_path, capsys):
    rows = make_scene_classes(24)
    both = rows.add_column("caption", [f"a {index}" for index in range(24)])
    broken = both.cast_column("image", Image(decode=False)).map(lambda row: {"image": {"bytes": b"x", "path": None}})
    for name, table in {"both": both, "broken": broken}.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    parts = []
    figures = evaluate_checkpoint(str(run[0]), data=str(tmp_path / "both.parquet"), report=parts.append)
    assert len(parts) == 2 and parts[1] == figures
    assert parts[0] == {key: value for key, value in figures.items() if not key.startswith("zero_shot")}
    # Nothing is computed where the first pictures all fail.
    output = tmp_path / "figures.json"
    command = ["evaluate", str(run[0]), "--data", str(tmp_path / "broken.parquet"), "--output", str(output)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "eval_dataset: none of the first 16 pictures can be read. First problems: Unidentified" in shown.err


def test_retrieval_figures_outlive_a_fault_of_the_classes(run, tmp_path, capsys, monkeypatch):
    rows = make_scene_classes(24).add_column("caption", [f"a {index}" for index in range(24)])
    rows.to_parquet(tmp_path / "x.parquet")

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_dissect.runs.evaluate.evaluate_zero_shot", out_of_memory)
    output = tmp_path / "figures.json"
    command = ["evaluate", str(run[0]), "--data", str(tmp_path / "x.parquet"), "--output", str(output)]
    with pytest.raises(RuntimeError, match="out of memory"):
        main(command)
    written = json.loads(output.read_text())
    assert written["recall_sum"] > 0 and not any(key.startswith("zero_shot") for key in written)
    assert "image to text" in capsys.readouterr().out


def test_the_loss_is_that_of_training_with_its_mask(run, tmp_path):
    folder = tmp_path / "run"
    settings = {"selection": {"mask_false_negatives": True}, "evaluation": {"zero_shot": None}}
    metrics = run_recipe(tiny_recipe(folder, **settings, data={"scenes_test": 24}))
    rows = make_scenes(24, split="test")
    repeated = rows.map(lambda row, place: {"caption": rows[place % 3]["caption"]}, with_indices=True)
    repeated.to_parquet(tmp_path / "x.parquet")
    assert evaluate_checkpoint(str(folder), batch_size=24)["loss"] == pytest.approx(metrics["final"]["loss"], abs=1e-5)
    masked = evaluate_checkpoint(str(folder), data=str(tmp_path / "x.parquet"), batch_size=24)
    (folder / "recipe.yaml").unlink()
    plain = evaluate_checkpoint(str(folder), data=str(tmp_path / "x.parquet"), batch_size=24)
    assert masked["repeated_captions"] == plain["repeated_captions"] == 24
    assert masked["recall_sum"] == plain["recall_sum"]
    model, processor = load_model_and_processor(name_or_path=str(folder))
    inputs = processor(
        text=list(repeated["caption"]),
        images=[decode_image(image) for image in repeated["image"]],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=16,
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_text
    same = torch.tensor([[i % 3 == j % 3 and i != j for j in range(24)] for i in range(24)])
    losses = {}
    for name, values in {"plain": logits, "masked": logits.masked_fill(same, -torch.inf)}.items():
        both = (values.log_softmax(1).diagonal() + values.log_softmax(0).diagonal()) / 2
        losses[name] = -both.mean().item()
    assert masked["loss"] == pytest.approx(losses["masked"], abs=1e-4)
    assert plain["loss"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["plain"] - losses["masked"] > 0.1
