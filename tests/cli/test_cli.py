"""The command as a person uses it: whole runs, what is printed, and what is said when something is wrong."""

import filecmp
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from testing.tiny_recipe import STEPS, tiny_settings, write_tiny_recipe
from transformers import AutoModel, AutoProcessor

from hf_dissect import SampleLedger, __version__, make_scenes
from hf_dissect.cli import main
from hf_dissect.data import make_scene_classes
from hf_dissect.recipe.file import shipped_recipes
from hf_dissect.recipe.recipe import Recipe, RecipeError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "hf_dissect.cli"]
RUN_FILES = {
    "README.md",
    "config.json",
    "ledger.safetensors",
    "metrics.json",
    "model.safetensors",
    "processor_config.json",
    "recipe.yaml",
    "report.html",
    "tokenizer.json",
}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory with `tiny.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    return write_tiny_recipe(tmp_path / "tiny.yaml").parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A working directory in which `train` was run once, in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_recipe(folder / "tiny.yaml")
    command = [*COMMAND, "train", "tiny.yaml", "training.eval_strategy=epoch", "selection.record=true"]
    return folder, subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def figures_without_times(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.pop("times")["total_s"] > 0
    return metrics


# ---- train ----


def test_train_leaves_a_complete_run_folder(trained):
    folder, finished = trained
    run = folder / "runs" / "tiny"
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in run.iterdir()} >= RUN_FILES | {"selection.parquet"}
    assert AutoModel.from_pretrained(run).config.model_type == "clip"
    assert AutoProcessor.from_pretrained(run).tokenizer("a red circle")["input_ids"]
    assert SampleLedger(64, columns=("correlation", "history")).load(run / "ledger.safetensors")["epoch"] == 1
    metrics = figures_without_times(run)
    assert (metrics["strategy"], metrics["steps"], metrics["num_pairs"]) == ("dissect", STEPS, 64)
    assert metrics["selection"]["noise_candidates"] == 0.25
    assert pq.read_table(run / "selection.parquet").num_rows == 2 * 64
    assert Recipe.load(run / "recipe.yaml").data.scenes_train == 64
    assert (run / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert "<svg" in (run / "report.html").read_text()


def test_train_prints_a_table_and_where_things_are_and_no_noise(trained):
    _, finished = trained
    lines = finished.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1.0", "epoch 2.0"]
    heading = next(number for number, line in enumerate(lines) if line.startswith("retrieval"))
    assert lines[heading].split() == ["retrieval", "R@1", "R@5", "R@10", "median", "rank"]
    assert [line[:13] for line in lines[heading + 2 : heading + 4]] == ["image to text", "text to image"]
    assert lines[-2:] == ["model   runs/tiny", "report  runs/tiny/report.html"]
    assert "num_" not in finished.stdout and "{'" not in finished.stdout
    for unwanted in ("Traceback", "Warning", "WARNING", "deprecated"):
        assert unwanted not in finished.stderr


def test_a_run_is_repeated_from_its_own_recipe_and_never_overwritten(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    before = (folder / "runs/tiny/metrics.json").read_bytes()
    assert main(["train", "runs/tiny/recipe.yaml"]) == 0
    assert "report  runs/tiny-2/report.html" in capsys.readouterr().out
    assert (folder / "runs/tiny/metrics.json").read_bytes() == before
    assert filecmp.cmp(folder / "runs/tiny/model.safetensors", folder / "runs/tiny-2/model.safetensors", shallow=False)
    assert figures_without_times(folder / "runs/tiny") == figures_without_times(folder / "runs/tiny-2")
    assert pq.read_table("runs/tiny/selection.parquet").equals(pq.read_table("runs/tiny-2/selection.parquet"))


def test_overrides_stand_before_and_behind_options(workplace):
    arguments = ["data.scenes_train=32", "--output-dir", "1e3", "training.num_train_epochs=3", "selection.ratio=0.25"]
    assert main(["train", "tiny.yaml", *arguments]) == 0
    metrics = figures_without_times(workplace / "1e3")
    assert metrics["num_pairs"] == 32 and metrics["steps"] == 3 * 2 and metrics["selection"]["kept_share"] == 0.25


def test_resume_ends_as_the_uninterrupted_run(workplace):
    assert main(["train", "tiny.yaml", "training.save_strategy=epoch", "--output-dir", "whole"]) == 0
    (workplace / "part/checkpoint-8").mkdir(parents=True)  # one whose writing was broken off
    (workplace / "part/checkpoint-8/model.safetensors").write_bytes(b"\0\0")
    (workplace / "whole/checkpoint-4").rename(workplace / "part/checkpoint-4")
    assert main(["train", "tiny.yaml", "training.save_strategy=epoch", "--output-dir", "part", "--resume"]) == 0
    assert filecmp.cmp("whole/model.safetensors", "part/model.safetensors", shallow=False)
    whole, part = load_file("whole/ledger.safetensors"), load_file("part/ledger.safetensors")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    whole, part = figures_without_times(workplace / "whole"), figures_without_times(workplace / "part")
    assert part["final"] == whole["final"] and part["steps"] == whole["steps"]


@pytest.mark.slow
def test_ctrl_c_stops_with_one_line_and_the_run_can_be_resumed(workplace):
    """Start the command and train for several epochs."""
    settings = ["training.num_train_epochs=40", "training.eval_strategy=epoch", "training.save_strategy=epoch"]
    command = [*COMMAND, "train", "tiny.yaml", *settings]
    with subprocess.Popen(
        command,
        cwd=workplace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started from a shell's background, the tests ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        # The line of the second evaluation: the checkpoint of the first epoch is written by then.
        reached = any(line.startswith("epoch 2.0") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert reached, errors
    assert running.returncode == 130, errors
    assert errors.splitlines()[-1] == "Interrupted. If a checkpoint was written, --resume continues from it."
    assert "Traceback" not in errors
    assert main(["train", "tiny.yaml", *settings, "training.num_train_epochs=5", "--resume"]) == 0
    assert figures_without_times(workplace / "runs/tiny")["steps"] >= 5 * 4


@pytest.mark.slow
def test_sigterm_in_the_last_pass_keeps_model_and_figures(workplace):
    """Start the command and score many pairs when it has trained; the bar of that long pass is awaited."""
    settings = ["training.max_steps=2", "data.scenes_train=6000", "evaluation.max_train_pairs=null"]
    command = [*COMMAND, "train", "tiny.yaml", *settings, "evaluation.batch_size=1"]
    with subprocess.Popen(command, cwd=workplace, env=environment(), stderr=subprocess.PIPE, text=True) as running:
        seen = ""
        while "scoring pairs" not in seen and (letter := running.stderr.read(1)):
            seen += letter
        running.send_signal(signal.SIGTERM)
        seen += running.communicate(timeout=60)[1]
    assert running.returncode == 143 and "Traceback" not in seen, seen
    last = seen.strip().splitlines()[-1]
    assert "Stopped by SIGTERM after the last step; the model is in runs/tiny" in last
    assert "hf-dissect evaluate runs/tiny" in last
    metrics = json.loads((workplace / "runs/tiny/metrics.json").read_text())
    assert metrics["unfinished"] is True and metrics["final"]["recall_sum"] > 0
    assert "noise_detection_auroc" not in metrics["final"]
    assert main(["evaluate", "runs/tiny", "--max-rows", "16"]) == 0


# ---- evaluate ----


def test_evaluate_takes_the_data_of_the_run(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    assert main(["evaluate", "runs/tiny", "--output", "figures.json"]) == 0
    assert "image to text" in capsys.readouterr().out
    found, final = json.loads(Path("figures.json").read_text()), figures_without_times(folder / "runs/tiny")["final"]
    assert found["recall_sum"] == final["recall_sum"] and found["loss"] == pytest.approx(final["loss"], abs=1e-5)


def test_evaluate_other_data_with_and_without_labels(trained, tmp_path, capsys):
    run = str(trained[0] / "runs" / "tiny")
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):
        make_scenes(12, seed=5, split=split).to_parquet(tmp_path / "pairs" / f"{split}.parquet")
    make_scene_classes(48).to_parquet(tmp_path / "labelled.parquet")

    assert main(["evaluate", run, "--data", str(tmp_path / "pairs")]) == 0
    of_folder = capsys.readouterr().out
    assert main(["evaluate", run, "--data", str(tmp_path / "pairs" / "test.parquet")]) == 0
    assert capsys.readouterr().out == of_folder and "recall sum" in of_folder

    names = make_scene_classes(1).features["label"].names
    arguments = ["--data", str(tmp_path / "labelled.parquet"), "--template", "a {}", "--template", "one {}"]
    assert main(["evaluate", run, *arguments, "--classes", ",".join(names)]) == 0
    of_list = capsys.readouterr().out
    assert "zero-shot top-1 accuracy" in of_list and "retrieval" not in of_list
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    assert main(["evaluate", run, *arguments, "--classes", str(tmp_path / "classes.txt")]) == 0
    assert capsys.readouterr().out == of_list


# ---- compare ----


def test_compare_sets_strategies_and_seeds_beside_each_other(workplace, capsys):
    arguments = ["--strategies", "none, random,dissect:momentum", "--seeds", "0,1", "--output-dir", "runs/all"]
    assert main(["compare", "tiny.yaml", "training.max_steps=4", *arguments, "selection.ratio=0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        "[1/6] none, seed 0",
        "[2/6] random, seed 0",
        "[3/6] dissect:momentum, seed 0",
        "[4/6] none, seed 1",
        "[5/6] random, seed 1",
        "[6/6] dissect:momentum, seed 1",
    ]
    heading = next(number for number, line in enumerate(lines) if line.startswith("strategy"))
    assert [line.split()[0] for line in lines[heading + 2 : heading + 5]] == ["none", "random", "dissect:momentum"]
    assert "seconds" in lines[heading] and "±" in lines[heading + 2]

    folder = workplace / "runs" / "all"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["strategy"] for row in metrics["table"]] == ["none", "random", "dissect:momentum"]
    assert [row["seeds"] for row in metrics["table"]] == [[0, 1]] * 3
    assert [run["steps"] for run in metrics["runs"]] == [4] * 6
    assert [run["selection"]["kept_share"] for run in metrics["runs"]] == [1, 0.25, 0.25] * 2
    report = (folder / "report.html").read_text()
    assert all(name in report for name in ("none", "random", "dissect:momentum"))
    assert {path.name for path in (folder / "dissect-momentum-seed1").iterdir()} >= RUN_FILES
    saved = Recipe.load(folder / "recipe.yaml")
    assert saved.compare.strategies == ["none", "random", "dissect:momentum"] and saved.compare.seeds == [0, 1]


def test_a_comparison_is_overwritten_only_when_asked(workplace, capsys):
    quick = ["compare", "tiny.yaml", "training.max_steps=1", "data.scenes_train=16", "--strategies", "random"]
    assert main(quick) == 0 and main(quick) == 0
    assert main([*quick, "--seeds", "7", "--overwrite"]) == 0
    seeds = [json.loads((workplace / f"runs/{name}/metrics.json").read_text()) for name in ("tiny", "tiny-2")]
    assert [[row["seeds"] for row in metrics["table"]] for metrics in seeds] == [[[7]], [[0]]]


# ---- recipes and help ----


def test_recipes_lists_all_and_prints_one(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(shipped_recipes())
    assert main(["recipes", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "quickstart"


def test_listing_recipes_does_not_wait_for_torch():
    check = "import sys, hf_dissect.cli as c; c.main(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True).returncode == 0


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "recipes"])
def test_help_of_each_command_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert leaving.value.code == 0
    examples = shown.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 2 and all(f" {command}" in line for line in examples)


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out.strip() == f"hf-dissect {__version__}"


# ---- errors ----

ERRORS = {
    "train no.yaml": "no.yaml: no such file; shipped recipes: ",
    "train quickstrat": "did you mean quickstart?",
    "train broken.yaml": "broken.yaml: line 1",
    "train .": "is a folder",
    "train tiny.yaml modle.freeze=text": "modle: unknown key",
    "train tiny.yaml training.lerning_rate=1": "did you mean 'learning_rate'?",
    "train tiny.yaml selection.ratio=0": "selection.ratio: 0 is not allowed; allowed: a number in (0, 1]",
    "train tiny.yaml selection.ratio=.nan": "selection.ratio",
    "train tiny.yaml selection.ratio=0.1": "a contrastive loss needs 2",
    "train tiny.yaml data.source=folder data.path=nowhere": "data.path 'nowhere' does not exist",
    "train tiny.yaml data.scenes_train=8": "fewer than one batch of 16 candidates",
    "train tiny.yaml model.vocab_size=300": "vocab_size must be at least 514",
    "train tiny.yaml --resume": "No checkpoint to resume from in runs/tiny.",
    "train tiny.yaml training.report_to=wandb": "training.report_to=['wandb']",
    "compare tiny.yaml --strategies random,best": "'best' is not a strategy; allowed: dissect, random,",
    "compare tiny.yaml --strategies random,random": "'random' is there twice",
    "compare tiny.yaml --seeds 0,x": "compare.seeds: [0, 'x'] is not allowed",
    "compare tiny.yaml --seeds 1.5": "compare.seeds: [1.5] is not allowed",
    "compare tiny.yaml --seeds=-1": "compare.seeds: -1 is not allowed",
    "compare tiny.yaml --seeds=": "compare.seeds: [] is not allowed",
    "evaluate nowhere": "nowhere has no recipe.yaml to take the data from; name the data with --data.",
    "evaluate nowhere --data scenes": "'nowhere' could not be loaded",
    "recipes nothing": "nothing: no such recipe; shipped are",
}


@pytest.mark.parametrize("line", ERRORS)
def test_what_cannot_work_is_one_line_and_status_2(line, workplace, capsys):
    Path("broken.yaml").write_text("name: [")
    if "wandb" in line and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("hf-dissect: ") and ERRORS[line] in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not list(workplace.glob("runs/*/*"))


@pytest.mark.parametrize(
    "line", ["", "bake", "train", "train tiny.yaml --fast", "push x y a.b=1", "evaluate x --max-rows 0"]
)
def test_an_impossible_command_line_is_explained(line, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(line.split())
    assert leaving.value.code == 2 and "usage: hf-dissect" in capsys.readouterr().err


def test_all_faults_of_a_recipe_are_told_at_once(workplace, capsys):
    assert main(["train", "tiny.yaml", "selection.ratio=2", "data.scenes_train=-1"]) == 2
    shown = capsys.readouterr().err
    assert "2 faults" in shown and "selection.ratio: 2" in shown and "data.scenes_train: -1" in shown


def test_debug_shows_the_traceback(workplace):
    with pytest.raises(RecipeError, match="no such file"):
        main(["train", "no.yaml", "--debug"])


def test_an_error_through_the_real_command(tmp_path):
    finished = subprocess.run(
        [*COMMAND, "train", "no.yaml"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("hf-dissect: no.yaml: no such file") and finished.stderr.count("\n") == 1


def test_unreadable_rows_are_counted_and_told(workplace, capsys):
    rows = make_scenes(40).to_list()
    rows[3]["caption"], rows[17]["image"] = None, {"bytes": b"no picture", "path": None}
    type(make_scenes(1)).from_list(rows, features=make_scenes(1).features).to_parquet("train.parquet")
    where = ["data.source=folder", "data.path=train.parquet", "evaluation.retrieval=false", "data.noise_rate=0"]
    assert main(["train", "tiny.yaml", *where, "selection.max_bad_fraction=0.1"]) == 0
    assert "2 rows could not be read and were skipped; see metrics.json for their ids" in capsys.readouterr().out
    assert figures_without_times(workplace / "runs/tiny")["bad_rows"]["ids"] == [3, 17]
    assert main(["train", "tiny.yaml", *where, "selection.max_bad_fraction=0.01"]) == 2
    assert "max_bad_fraction" in capsys.readouterr().err


def test_the_tiny_recipe_is_what_it_says():
    recipe = Recipe.from_dict(tiny_settings())
    assert STEPS == 2 * recipe.data.scenes_train // recipe.training["per_device_train_batch_size"]
