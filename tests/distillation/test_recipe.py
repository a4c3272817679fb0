"""Recipes of distillations: all faults are reported at once, and `hf-dissect train` leaves a complete folder."""

import json

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, List, Value
from testing import tiny_models
from testing.tiny_modalities import tiny_arguments, tiny_auxiliaries, tiny_columns, tiny_student
from transformers import AutoModel, CLIPVisionModel

from hf_dissect.cli import main
from hf_dissect.data import make_scenes
from hf_dissect.distillation import DistillationRecipe, DistillationTrainer
from hf_dissect.recipe.file import read_description, shipped_recipes
from hf_dissect.recipe.recipe import Recipe, RecipeError

UTD = "amid-utd-mhad"
SMALL = ["student.config.grid=[1, 1]", "training.per_device_train_batch_size=8", "training.use_cpu=true"]
SMALL += ["training.report_to=none", "training.disable_tqdm=true"]


@pytest.fixture
def utd(tmp_path):
    subject = np.arange(32) % 8 + 1
    columns = {"skeleton": np.random.default_rng(0).normal(size=(32, 4, 20, 3)).astype(np.float32)}
    columns["inertial"] = columns["skeleton"][:, :, :2].reshape(32, 4, 6)
    depth = np.random.default_rng(0).integers(0, 255, (32, 2, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "utd.npz", **columns, depth=depth, action=np.arange(32) // 8, subject=subject)
    return tmp_path / "utd.npz"


@pytest.mark.parametrize("name", ["amid-clip", UTD])
def test_shipped_recipes_are_sound_and_read_back(name, tmp_path):
    recipe = DistillationRecipe.load(name)
    assert recipe.name == name and read_description(shipped_recipes()[name]) == recipe.description != ""
    recipe.save(tmp_path / "recipe.yaml")
    assert DistillationRecipe.load(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="distillation: makes this the recipe of a distillation"):
        Recipe.load(name)


@pytest.mark.parametrize(
    "override, message",
    [
        ("distillation.metod=amid", "distillation.metod: unknown key .*did you mean 'method'"),
        ("distillation.method=kd", "distillation.method: 'kd' is not allowed"),
        ("distillation.term_weights.entropy=1", "distillation.term_weights: 'entropy' is not allowed"),
        ("distillation.student_column=rgb", "is set by student.column"),
        ("student.colour=red", "student.colour: unknown key"),
        ("student.column=null", "student.column: missing"),
        ("student.name_or_path=x", "student.name_or_path: 'x' and student.config are both set"),
        ("auxiliaries.inertial.config={hidden_size: 3}", "auxiliaries.inertial.config.model_type: None"),
        ("auxiliaries.skeleton.column=inertial", "'inertial' is there twice"),
        ("auxiliaries={}", "auxiliaries: missing; hinton, crd, mi_student_only, amid learn from at least one"),
        ("data.path=null", "data.path: missing"),
        ("data.test_groups=[1]", "data.test_groups: 1 is among data.train_groups, too"),
        ("data.group_column=null", "data.group_column: missing; arrays are one table"),
        ("data.separator=;", "data.separator: ';' is only for tables, not for data.source npz; leave it out"),
        ("data.encoding=cp1252", "data.encoding: 'cp1252' is only for tables, not for data.source npz; leave it out"),
        ("data.validation_groups=[]", "training.eval_strategy: needs validation rows"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("selection.ratio=0.5", "selection: unknown key"),
    ],
)
def test_faults_name_the_key_and_what_is_allowed(override, message):
    with pytest.raises(RecipeError, match=message):
        DistillationRecipe.load(UTD, ["data.path=x", override])


def test_faults_are_reported_together():
    with pytest.raises(RecipeError) as error:
        DistillationRecipe.load(UTD, ["distillation.method=kd", "training.seed=-1"])
    assert len(error.value.faults) == 2


def test_train_leaves_a_folder_that_repeats_and_resumes(utd, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = [
        f"data.path={utd}",
        *SMALL,
        "training.max_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=1",
    ]
    assert main(["train", UTD, *settings, "--output-dir", str(folder)]) == 0
    assert "student_accuracy" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["rows"]["complete"] == 12 and metrics["method"] == "amid"
    assert {"student_accuracy", "teacher_accuracy", "retrieval_R@1"} <= set(metrics["final"])
    assert {"report.html", "README.md", "config.json", "model.safetensors", "recipe.yaml", "encoder"} <= {
        path.name for path in folder.iterdir()
    }
    model = AutoModel.from_pretrained(folder)
    assert len(model.config.encoder_config.input_mean) == 1 and model.config.num_labels == 4
    assert main(["train", str(folder / "recipe.yaml"), "--resume", "training.max_steps=3"]) == 0
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "override, message",
    [
        ("student.column=rgb", "there is no column 'rgb'; there are 'skeleton'"),
        ("data.label_column=verb", "There is no column 'verb'"),
        ("data.train_groups=[9]", "data.train_groups: no row has 9 in subject; there are 1, 2"),
        ("data.path=nowhere.npz", "there is no .npz file"),
        ("auxiliaries.skeleton.config.num_channels=59", "skeleton: arrays of \\(4, 20, 3\\) have no 59 channels"),
        ("student.config.model_type=eye", "config.model_type 'eye' is not a known architecture"),
        (
            "training.metric_for_best_model=acuracy",
            "training.metric_for_best_model: 'acuracy' is not a figure of the evaluation; allowed: loss, student_acc",
        ),
    ],
)
def test_data_that_do_not_fit_end_with_a_word(override, message, utd, tmp_path, capsys):
    import re

    best = ["training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.save_strategy=steps"]
    best = [*best, "data.validation_groups=[2]", "data.test_groups=[4]"] if "metric" in override else []
    settings = [f"data.path={utd}", *SMALL, *best, override, "--output-dir", str(tmp_path / "run")]
    assert main(["train", UTD, *settings]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_arrays_of_unequal_lengths_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", depth=np.zeros((5, 2, 8, 8)), action=np.zeros(4))
    assert main(["train", UTD, f"data.path={tmp_path}", "--output-dir", str(tmp_path / "run")]) == 2
    assert "the arrays differ in length (depth 5, action 4)" in capsys.readouterr().err


def test_an_image_classifier_learns_with_captions(tmp_path):
    for part in tiny_models.tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    for split in ("train", "test"):
        rows = make_scenes(16, split=split).add_column("label", ["wren", "robin"] * 8).to_list()
        rows[0]["caption"] = None
        Dataset.from_list(rows, features=make_scenes(1).add_column("label", ["wren"]).features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    clip = [f"student.name_or_path={tmp_path / 'clip'}", f"auxiliaries.caption.name_or_path={tmp_path / 'clip'}"]
    run = ["training.max_steps=4", "training.save_strategy=no", "training.eval_strategy=no", *SMALL[1:]]
    run.append("training.gradient_checkpointing=true")
    settings = [f"data.path={tmp_path}", "data.validation_split=null", *clip, *run]
    assert main(["train", "amid-clip", *settings, "--output-dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"]["student_only"] == 1 and "auxiliary_caption_accuracy" in metrics["final"]
    encoder = AutoModel.from_pretrained(tmp_path / "run" / "encoder")  # an ordinary CLIP tower with its processor
    assert type(encoder) is CLIPVisionModel
    assert (tmp_path / "run" / "encoder" / "preprocessor_config.json").is_file()


def test_columns_of_tensors_come_from_tables_as_well(tmp_path):
    columns = tiny_columns(16)
    skeleton = [
        None if row == 3 else value.tolist() for row, value in enumerate(columns["skeleton"].reshape(16, 6, 6))
    ]
    features = {
        "depth": List(List(List(Value("uint8")))),
        "skeleton": Array2D((6, 6), "float32"),
        "inertial": List(List(Value("float32"))),
        "action": Value("string"),
    }
    rows = {"depth": columns["depth"].tolist(), "skeleton": skeleton, "inertial": columns["inertial"].tolist()}
    rows["action"] = [f"action {number}" for number in columns["action"]]
    Dataset.from_dict(rows, features=Features(features)).to_parquet(tmp_path / "rows.parquet")
    table = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    arguments = tiny_arguments(tmp_path, num_train_epochs=1, max_steps=-1)
    trainer = DistillationTrainer(tiny_student(), arguments, tiny_auxiliaries(), table)
    trainer.train()
    assert trainer.labels == [f"action {number}" for number in range(4)]
    assert trainer.rows.summary()["reasons"] == {"auxiliary missing": 1}
