"""Typical mistakes: each ends within seconds, before training, in one line with the recipe's key and the way out."""

import json
import os
import time
from pathlib import Path

import pytest
from testing.tiny_recipe import write_tiny_recipe

from hf_dissect.cli import main
from hf_dissect.data import make_scene_classes

CLASSES = make_scene_classes(1).features["label"].names
LABELLED = "evaluation.zero_shot.source=folder evaluation.zero_shot.path=named.parquet"
LABELLED += " evaluation.zero_shot.label_column=species"
AS_NUMBERS = "evaluation.zero_shot.source=folder evaluation.zero_shot.path=numbered.parquet"
WRITE_RATIO = "selection.ratio: write selection.ratio=0.3"

# Words of a command line -> words of the message; CLASSES, UPPER and SWAPPED stand for lists of class names.
MISTAKES = {
    # how settings are written on the command line
    "train tiny.yaml selection.ratio 0.3": WRITE_RATIO,
    "train tiny.yaml selection.ratio = 0.3": WRITE_RATIO,
    "train tiny.yaml selection.ratio= 0.3": WRITE_RATIO,
    "train tiny.yaml selection.ratio =0.3": WRITE_RATIO,
    "train tiny.yaml selection.ratio:0.3": WRITE_RATIO,
    "train tiny.yaml selection.ratio: 0.3": WRITE_RATIO,
    "train tiny.yaml --selection.ratio=0.3": WRITE_RATIO,
    "train tiny.yaml --selection.ratio 0.3": WRITE_RATIO,
    "train tiny.yaml -selection.ratio=0.3": WRITE_RATIO,
    "train --selection.ratio=0.3 tiny.yaml": WRITE_RATIO,
    "compare tiny.yaml selection.ratio 0.3 --seeds 0,1": WRITE_RATIO,
    "train tiny.yaml training.learning_rate 1e-4": "write training.learning_rate=1e-4",
    "train tiny.yaml --learning_rate 1e-4": "training.learning_rate=1e-4",
    "train tiny.yaml --learning-rate=1e-4": "training.learning_rate=1e-4",
    "train tiny.yaml selection.ratio": "'selection.ratio' is not an override",
    "train tiny.yaml tiny.yaml": "'tiny.yaml' is a second recipe",
    # keys
    "train tiny.yaml ratio=0.3": "did you mean 'selection.ratio'?",
    "train tiny.yaml learning_rate=0.3": "did you mean 'training.learning_rate'?",
    "train tiny.yaml lr=0.3": "did you mean 'training.learning_rate'?",
    "train tiny.yaml training.lr=0.3": "did you mean",
    "train tiny.yaml data.strategy=none": "did you mean 'selection.strategy'?",
    "train tiny.yaml selection.stratgy=none": "did you mean 'strategy'?",
    # files
    "train empty.yaml": "empty.yaml: is empty; a recipe needs at least a name and a model",
    "train tabs.yaml": "YAML is indented by spaces, never by tabs",
    "train two.yaml": "a file holds one recipe, without a line ---",
    "train list.yaml": "a recipe is a mapping of sections",
    "train quoted.yaml": "training.learning_rate: '5e-5' is not allowed; allowed: a number, at least 0; write 5e-5",
    "train folder": "folder: is a folder; did you mean folder/recipe.yaml?",
    # device and packages
    "train tiny.yaml training.fp16=true": "training.fp16: true needs a GPU",
    "train tiny.yaml training.tf32=true": "training.tf32: true needs an NVIDIA GPU",
    "train tiny.yaml training.bf16=true training.use_cpu=false": "training.bf16: true needs a GPU",
    "train tiny.yaml training.bf16_full_eval=true training.use_cpu=false": "training.bf16_full_eval: true needs a GPU",
    "train tiny.yaml training.report_to=wandbb": "training.report_to='wandbb'",
    "train tiny.yaml training.optim=adamw_bnb_8bit": "training.optim=adamw_bnb_8bit",
    "train tiny.yaml training.deepspeed=none.json": "training.deepspeed='none.json'",
    "train tiny.yaml training.lr_scheduler_type=cosine_with_min_lr": "training.lr_scheduler_kwargs",
    "train tiny.yaml training.dataloader_prefetch_factor=2": "training.dataloader_prefetch_factor=2",
    # evaluation and saving
    "train tiny.yaml training.num_train_epochs=0": "training.num_train_epochs: 0 is not allowed",
    "train tiny.yaml training.load_best_model_at_end=true": "set training.eval_strategy to 'epoch' or 'steps'",
    "train tiny.yaml training.load_best_model_at_end=true training.eval_strategy=epoch": "set training.save_strategy",
    "train tiny.yaml training.save_strategy=best": "training.save_strategy: 'best' needs evaluations",
    "train tiny.yaml training.save_strategy=epoch training.eval_strategy=epoch training.load_best_model_at_end=true "
    "training.metric_for_best_model=recal_sum": "training.metric_for_best_model: 'recal_sum' is not a figure",
    "train tiny.yaml training.eval_strategy=epoch data.scenes_validation=0": "training.eval_strategy: 'epoch' needs",
    "train tiny.yaml data.source=folder data.path=pairs.parquet data.test_split=tset evaluation.retrieval=false":
    "data.test_split: the data have no split 'tset'",
    "train tiny.yaml data.scenes_train=8": "fewer than one batch of 16 candidates",
    # folders
    "train tiny.yaml --output-dir file": "training.output_dir 'file': no folder can be written there (file is a file)",
    "train tiny.yaml --output-dir file/x/y": "file is a file",
    "compare tiny.yaml --output-dir file": "training.output_dir 'file': no folder",
    "train tiny.yaml --resume --output-dir empty": "No checkpoint to resume from in empty.",
    "evaluate folder --output absent/figures.json": "--output absent/figures.json: there is no folder",
    "evaluate folder --output tiny.yaml": "--output tiny.yaml exists and does not hold the figures of an evaluation;",
    "evaluate folder --output config.json": "--output config.json exists and does not hold the figures",
    # what the recipe names
    "train tiny.yaml selection.ledger=nowhere": "selection.ledger 'nowhere'",
    "train tiny.yaml model.config=null model.name_or_path=./nowhere": "'./nowhere' could not be loaded",
    f"train tiny.yaml evaluation.zero_shot.classes=UPPER {LABELLED}": "evaluation.zero_shot.classes: classes has 'RED",
    f"train tiny.yaml evaluation.zero_shot.classes=SWAPPED {AS_NUMBERS}": "evaluation.zero_shot.classes: classes has",
    f'train tiny.yaml evaluation.zero_shot.classes=["cat"] {LABELLED}': "evaluation.zero_shot.classes: ",
    f'train tiny.yaml evaluation.zero_shot.classes=["cat"] {AS_NUMBERS}': "evaluation.zero_shot.classes: ",
    f"train tiny.yaml evaluation.zero_shot.classes=CLASSES {AS_NUMBERS} evaluation.zero_shot.label_column=labl":
    "evaluation.zero_shot.label_column 'labl'",
    f"train tiny.yaml evaluation.zero_shot.classes=CLASSES {AS_NUMBERS} evaluation.zero_shot.image_column=img":
    "evaluation.zero_shot.image_column 'img'",
    f"train tiny.yaml evaluation.zero_shot.classes=CLASSES {AS_NUMBERS} evaluation.zero_shot.split=tset":
    "evaluation.zero_shot.split 'tset'",
    "train tiny.yaml evaluation.zero_shot.classes=CLASSES evaluation.zero_shot.source=folder "
    "evaluation.zero_shot.path=nowhere": "evaluation.zero_shot.path 'nowhere'",
    f"compare tiny.yaml evaluation.zero_shot.classes=UPPER {LABELLED}": "evaluation.zero_shot.classes: classes has",
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A working directory with a sound recipe, faulty ones, and labelled pictures."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny = write_tiny_recipe(folder / "tiny.yaml").read_text()
    (folder / "file").write_text("not a folder")
    (folder / "folder").mkdir()
    (folder / "folder" / "recipe.yaml").write_text(tiny)
    (folder / "config.json").write_text('{"model_type": "clip", "projection_dim": 16}')
    (folder / "empty.yaml").write_text("")
    (folder / "tabs.yaml").write_text("name: x\nmodel:\n\tname_or_path: y\n")
    (folder / "two.yaml").write_text("name: x\n---\nname: y\n")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "quoted.yaml").write_text(tiny.replace("learning_rate: 0.001", "learning_rate: '5e-5'"))
    labelled = make_scene_classes(96)
    labelled.to_parquet(folder / "numbered.parquet")
    names = [CLASSES[label] for label in labelled["label"]]
    labelled.add_column("species", names).to_parquet(folder / "named.parquet")
    labelled.add_column("caption", names).to_parquet(folder / "pairs.parquet")
    return folder


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_the_way_out(line, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    upper = [name.upper() for name in CLASSES]
    lists = {"CLASSES": CLASSES, "UPPER": upper, "SWAPPED": [*upper[1::-1], *upper[2:]]}
    words = []
    for word in line.split():
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}{json.dumps(lists[value])}" if value in lists else word)
    start = time.monotonic()
    assert main(words) == 2
    shown = capsys.readouterr()
    assert MISTAKES[line] in shown.err, shown.err
    assert shown.out == "" or line.startswith("compare")
    assert shown.err.startswith("hf-dissect: ") and len(shown.err.splitlines()) == 1
    assert time.monotonic() - start < 10
    assert not [path for path in workplace.glob("runs/*/*") if path.is_file()]  # no step was trained, no model saved


def test_other_words_with_dots_are_left_alone(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    settings = ["training.max_steps=1", "data.scenes_train=16", "selection.strategy=none"]
    assert main(["train", "tiny.yaml", "--output-dir", "runs.of/model.v2", *settings]) == 0
    assert (workplace / "runs.of/model.v2/metrics.json").is_file()


def test_classes_in_another_case_but_in_order_are_right(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    classes = json.dumps([name.title() for name in CLASSES])
    settings = ["training.max_steps=1", "data.scenes_train=16", *AS_NUMBERS.split()]
    assert (
        main(["train", "tiny.yaml", "--output-dir", "titles", *settings, f"evaluation.zero_shot.classes={classes}"])
        == 0
    )
    assert json.loads((workplace / "titles/metrics.json").read_text())["final"]["zero_shot_num_images"] == 96


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    Path("closed").mkdir(mode=0o500)
    assert main(["train", "tiny.yaml", "--output-dir", "closed/run"]) == 2
    assert (
        "training.output_dir 'closed/run': no folder can be written there (Permission denied)"
        in capsys.readouterr().err
    )
