"""What a folder holds is never written over unasked, and with --overwrite nothing but results goes."""

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file
from testing.tiny_models import tiny_clip, tiny_pairs
from testing.tiny_recipe import tiny_recipe, write_tiny_recipe

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.cli import main
from hf_dissect.runs.output_folder import choose_free_output_dir, find_free_folder, holds_run
from hf_dissect.runs.run import run_recipe

QUICK = ["training.max_steps=1", "data.scenes_train=16", "selection.strategy=none"]


@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "adapter_config.json"),
        *("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
        *("epoch_30.pt", "modules.json", "metrics.json", "recipe.yaml", "report.html", "report_data.json"),
        *("ledger.safetensors", "selection.parquet", "scores.parquet", "audit.html", "README.md", "tokenizer.json"),
        "checkpoint-12/model.safetensors",
    ],
)
def test_a_result_of_any_kind_takes_a_folder(file, tmp_path, caplog):
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    with caplog.at_level(logging.WARNING):
        assert choose_free_output_dir(tiny_recipe(tmp_path / "run")).output_dir == str(tmp_path / "run-2")
    assert "already holds" in caplog.text and file.split("/")[0] in caplog.text


@pytest.mark.parametrize("file", ["notes.txt", "pictures/a.png", "data.parquet", "events.out.tfevents.1"])
def test_other_files_do_not(file, tmp_path):
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    assert not holds_run(tmp_path / "run") and not holds_run(tmp_path / "absent")


def test_a_folder_without_a_name_of_its_own_gets_one(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert find_free_folder(Path("."), lambda path: path == Path(".")) == tmp_path / "work-2"


def test_the_command_leaves_a_model_alone_and_writes_over_it_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml")
    foreign = {"config.json": "{}", "pytorch_model.bin": "weights", "model-00001-of-00002.safetensors": "part"}
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    (tmp_path / "mine" / "photos" / "config.json").write_text("not a result")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for name, text in foreign.items():
        (tmp_path / "mine" / name).write_text(text)
    assert main(["train", "tiny.yaml", "--output-dir", "mine", *QUICK]) == 0
    assert "report  mine-2/report.html" in capsys.readouterr().out
    assert {name: (tmp_path / "mine" / name).read_text() for name in foreign} == foreign

    # The second run leaves a checkpoint that a third one, with --overwrite, must not leave to be resumed from.
    assert (
        main(["train", "tiny.yaml", "--output-dir", "mine", "--overwrite", *QUICK, "training.save_strategy=steps"])
        == 0
    )
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["model_type"] == "clip"
    assert not (tmp_path / "mine" / "pytorch_model.bin").exists()
    assert not (tmp_path / "mine" / "model-00001-of-00002.safetensors").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "mine" / "photos" / "config.json").read_text() == "not a result"
    assert (tmp_path / "mine" / "checkpoint-1").is_dir()
    assert main(["train", "tiny.yaml", "--output-dir", "mine", "--overwrite", *QUICK]) == 0
    assert not (tmp_path / "mine" / "checkpoint-1").exists()


def test_a_mistake_with_overwrite_costs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml")
    assert main(["train", "tiny.yaml", *QUICK]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs/tiny").iterdir() if path.is_file()}
    zero_shot = "evaluation.zero_shot={classes: [a, b]}"
    assert main(["train", "tiny.yaml", "--overwrite", *QUICK, zero_shot]) == 2
    start = ["model.config=null", "model.name_or_path=runs/tiny"]
    assert main(["train", "tiny.yaml", "--overwrite", *QUICK, *start]) == 2
    assert (
        "model.name_or_path: 'runs/tiny' is in 'runs/tiny', which --overwrite would empty" in capsys.readouterr().err
    )
    assert main(["train", "tiny.yaml", "--overwrite", *QUICK, "selection.ledger=runs/tiny"]) == 2
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "runs/tiny").iterdir() if path.is_file()}


def test_a_comparison_that_broke_off_in_its_first_run_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml")
    (tmp_path / "runs/tiny/none-seed0/checkpoint-3").mkdir(parents=True)
    assert main(["compare", "tiny.yaml", *QUICK, "--strategies", "none"]) == 0
    assert (tmp_path / "runs/tiny-2/none-seed0/metrics.json").is_file()
    assert not (tmp_path / "runs/tiny/none-seed0/metrics.json").exists()


def test_a_resumed_comparison_keeps_finished_runs_of_other_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml")
    line = ["compare", "tiny.yaml", *QUICK, "--strategies", "none"]
    assert main(line) == 0
    weights = (tmp_path / "runs/tiny/none-seed0/model.safetensors").read_bytes()
    assert main([*line, "--resume", "training.learning_rate=0.1"]) == 2
    assert "none-seed0 holds a finished run with other settings" in capsys.readouterr().err
    assert (tmp_path / "runs/tiny/none-seed0/model.safetensors").read_bytes() == weights
    assert main([*line, "--resume", "--overwrite", "training.learning_rate=0.1"]) == 0
    assert (tmp_path / "runs/tiny/none-seed0/model.safetensors").read_bytes() != weights


def test_functions_refuse_a_foreign_model_and_warn_of_an_own_run(tmp_path, caplog):
    (tmp_path / "adapter_config.json").write_text("{}")
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1}, selection={"strategy": "none"})
    with pytest.raises(
        ValueError, match=r"training.output_dir .* holds a model that is not of a run \(adapter_config"
    ):
        run_recipe(recipe)
    run_recipe(recipe, overwrite=True)
    assert not (tmp_path / "adapter_config.json").exists()
    with caplog.at_level(logging.WARNING):
        run_recipe(recipe)
    assert "holds an earlier run" in caplog.text


def test_a_trainer_refuses_to_replace_a_foreign_model(tmp_path):
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path)
    settings = dict(per_device_train_batch_size=16, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)

    def make_trainer(**more):
        args = DissectTrainingArguments(
            str(tmp_path), selection_strategy="none", save_strategy="no", **settings, **more
        )
        return DissectTrainer(model, args, train_dataset=tiny_pairs(16), processing_class=processor)

    before = load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="output_dir .* holds a model that is not of a run .*save_run_folder=False"):
        make_trainer().train()
    make_trainer(save_run_folder=False).train()
    after = load_file(tmp_path / "model.safetensors")
    assert all((after[name] == weight).all() for name, weight in before.items())
