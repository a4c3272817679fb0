"""A script of `hf-dissect job` where it runs: settings, environment, a run that is broken off and started again."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import JobHardware
from testing.tiny_recipe import STEPS, tiny_settings

from hf_dissect.cli.job_run import run_job
from hf_dissect.recipe import Recipe
from hf_dissect.recipe.yaml import format_yaml
from hf_dissect.runs.job_script import write_job_script

ROOT = Path(__file__).parents[2]
SAVES = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Writes job.py of a recipe into an empty folder and runs it there: exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, **sections) -> int:
        if sections or not Path("job.py").exists():
            Path("job.py").write_text(write_job_script(Recipe.from_dict(tiny_settings(**sections))).text)
        monkeypatch.setattr(sys, "argv", ["job.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("job.py", run_name="__main__")
        return ended.value.code

    return run


def steps(run: str = "runs/tiny") -> int:
    return json.loads(Path(run, "metrics.json").read_text())["steps"]


def test_started_again_it_continues_and_then_has_nothing_to_do(job, capsys):
    assert job("training.max_steps=4", training=SAVES) == 0
    assert steps() == 4
    Path("runs/tiny/metrics.json").unlink()  # broken off before the figures
    before = Path("runs/tiny/checkpoint-4/model.safetensors").stat().st_mtime_ns
    assert job("training.max_steps=4") == 0
    assert steps() == 4 and Path("runs/tiny/checkpoint-4/model.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    assert job("training.max_steps=4") == 0
    assert "runs/tiny holds this run, finished; --overwrite trains it again" in capsys.readouterr().out
    # Other settings are never mixed in unasked.
    assert job() == 2
    error = capsys.readouterr().err
    assert "runs/tiny holds a run with other settings (training.max_steps)" in error and "--resume" in error
    assert job("--resume") == 0
    assert steps() == STEPS and sorted(path.name for path in Path("runs").iterdir()) == ["tiny"]
    assert job("selection.ratio=0.25", "--output-dir", "runs/other", "training.max_steps=2") == 0
    assert steps("runs/other") == 2


def test_settings_of_another_machine_come_from_the_environment(job, tmp_path, monkeypatch, capsys):
    from hf_dissect import make_scenes

    place = tmp_path / "größe: 1, #2"
    place.mkdir()
    for split in ("train", "validation", "test"):
        make_scenes(32, split=split).to_parquet(place / f"{split}.parquet")
    data = {"source": "folder", "path": "/nowhere"}
    given = tiny_settings(training={"max_steps": 2}) | {"data": data}
    Path("job.py").write_text(write_job_script(Recipe.from_dict(given)).text)
    assert job() == 2
    expected = (
        "hf-dissect: job.py: data.path: was of another machine; set HF_DISSECT_DATA_PATH, or give data.path=VALUE"
    )
    assert capsys.readouterr().err.strip() == expected
    assert not Path("runs").exists()
    monkeypatch.setenv("HF_DISSECT_DATA_PATH", str(place))
    assert job() == 0
    assert Recipe.load("runs/tiny/recipe.yaml").data.path == str(place)
    monkeypatch.delenv("HF_DISSECT_DATA_PATH")
    assert job(f"data.path={json.dumps(str(place), ensure_ascii=False)}", "--output-dir", "runs/b") == 0
    assert steps("runs/b") == 2


def test_a_section_that_is_replaced_needs_no_variable(job, capsys):
    labelled = {"source": "folder", "path": "/nowhere", "classes": ["a"]}
    given = tiny_settings(evaluation={"zero_shot": labelled}, training={"max_steps": 2})
    Path("job.py").write_text(write_job_script(Recipe.from_dict(given)).text)
    assert job() == 2 and "evaluation.zero_shot.path: was of another machine" in capsys.readouterr().err
    assert job("evaluation.zero_shot=null") == 0


@pytest.mark.slow
def test_two_processes(job, tmp_path):
    """What `--processes 2` starts: one run, in one folder, that continues like any other."""
    Path("job.py").write_text(write_job_script(Recipe.from_dict(tiny_settings(training={"max_steps": 2}))).text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "job.py", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps() == 2 and done.stdout.count("report  runs/tiny/report.html") == 1
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    assert json.loads(Path("runs/tiny/metrics.json").read_text())["num_pairs"] == 64


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["selection.ratio=2"], "selection.ratio: 2"),
        (["selection.ratio", "0.3"], "write selection.ratio=0.3"),
        (["--learning_rate=0.3"], "training.learning_rate=0.3"),
        (["other.yaml"], "is a second recipe"),
        (["--resume"], "No checkpoint to resume from in runs/tiny"),
    ],
)
def test_mistakes_are_one_message(job, capsys, words, problem):
    try:
        assert job(*words) == 2
    finally:
        error = capsys.readouterr().err
    assert problem in error and "Traceback" not in error and not Path("runs").exists()


def test_help_names_recipe_options_and_variables(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/job.py"])
    with pytest.raises(SystemExit) as ended:
        run_job(format_yaml(tiny_settings()), {"data.path": "HF_DISSECT_DATA_PATH"}, ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("job.py", "tiny", "--output-dir", "--resume", "--overwrite", "HF_DISSECT_DATA_PATH", "data.path"):
        assert part in text


def test_without_the_package_the_script_says_how_to_run_it(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_dissect.cli.job_run", None)
    message = job()
    assert "run it as `uv run job.py`" in message and "\n" not in message


def test_the_client_of_the_hub_would_start_it(tmp_path):
    """`hf jobs uv run --dry-run` with the options that the documentation shows."""
    training = {"push_to_hub": True, "hub_model_id": "ada/tiny"}
    script = write_job_script(Recipe.from_dict(tiny_settings(training=training)), timeout="2h")
    (tmp_path / "job.py").write_text(script.text)
    assert "l4x1" in {hardware.value for hardware in JobHardware}
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--dry-run", "--flavor", "l4x1"]
    command += ["-e", "HF_DISSECT_DATA_PATH=/data", "-v", "hf://datasets/ada/pairs:/data", "job.py"]
    command += ["training.max_steps=2", "--output-dir", "/runs/mine"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in (
        "l4x1",
        "2h",
        "HF_TOKEN",
        "training.max_steps=2 --output-dir /runs/mine",
        "hf://datasets/ada/pairs:/data",
    ):
        assert part in done.stdout + done.stderr
