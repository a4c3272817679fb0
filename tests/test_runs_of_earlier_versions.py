"""Runs that an earlier version wrote are resumed, evaluated, published and compared as if they were of this one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, CLIPModel

import hf_dissect
from hf_dissect.cli import main
from hf_dissect.recipe.schema import DataSection

FIXTURES = Path(__file__).parent / "fixtures"
VERSION = "runs_of_0_1_0"
EXPECTED = json.loads((FIXTURES / VERSION / "expected.json").read_text())
FINISHED = ("selection", "distillation")
# Bit for bit on one kind of processor; others round differently, and training enlarges that.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5, "nan_ok": True}
TIMES = ("time", "per_second", "train_loss", "total_flos")
PUBLISHED = {
    "selection": {
        *("README.md", "report.png", "recipe.yaml", "metrics.json", "config.json", "model.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    },
    "distillation": {
        *("README.md", "recipe.yaml", "metrics.json", "config.json", "model.safetensors"),
        *("encoder/config.json", "encoder/model.safetensors"),
    },
}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Copy the runs into a folder of their own and work there."""
    shutil.copytree(FIXTURES / VERSION, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def assert_same(found, expected, where: str) -> None:
    """Compare what JSON files hold; numbers up to `TOLERANCE`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for position, value in enumerate(expected):
            assert_same(found[position], value, f"{where}.{position}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **TOLERANCE), where
    else:
        assert found == expected, where


def read_log(checkpoint: Path) -> list[dict]:
    """Return a checkpoint's log without what depends on the clock."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in TIMES)} for entry in entries
    ]


def describe_weights(path: Path) -> dict[str, list[float]]:
    """Return norm, first and last value of each tensor in a file; the tensors of a state under their earlier names."""
    if path.name == "distillation_state.safetensors":
        path = path.with_name("dissect_state.safetensors")
    tensors = {name: values.double().flatten() for name, values in load_file(path).items()}
    tensors = {name.removeprefix("parts/").replace("banks/", "bank/"): values for name, values in tensors.items()}
    return {name: [values.norm().item(), values[0].item(), values[-1].item()] for name, values in tensors.items()}


def read_choices(run: Path) -> list[dict]:
    """Return candidates, scores and choices of all steps."""
    return pq.read_table(run / "selection.parquet").to_pylist()


def read_columns(run: Path) -> dict[str, list[float]]:
    """Return the columns of a run's ledger."""
    return {name: values.tolist() for name, values in load_file(run / "ledger.safetensors").items()}


def evaluate(checkpoint: str, *options: str) -> dict[str, float]:
    """Return the figures of `hf-dissect evaluate`."""
    assert main(["evaluate", checkpoint, *options, "--output", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


# ---- resuming ----


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_is_resumed_to_the_end_that_it_had(name, runs):
    expected = EXPECTED[name]
    recipe = f"{name}/{expected['checkpoint']}/recipe.yaml"
    assert main(["train", recipe, "--resume", "--output-dir", str(runs / name)]) == 0
    metrics = json.loads((runs / name / "metrics.json").read_text())
    assert_same({key: metrics[key] for key in expected["metrics"]}, expected["metrics"], "metrics")
    assert_same(read_log(runs / name / expected["last_checkpoint"]), expected["log_history"], "log")
    for path, weights in expected["weights"].items():
        assert_same(describe_weights(runs / name / path), weights, path)
    assert (runs / name / "report.html").is_file()
    if name == "selection":
        before = FIXTURES / VERSION / name
        assert_same(read_choices(runs / name), read_choices(before), "choices")
        assert_same(read_columns(runs / name), read_columns(before), "ledger")


# ---- evaluating ----


@pytest.mark.parametrize("name", EXPECTED)
def test_a_checkpoint_is_evaluated_as_before(name, runs):
    expected = EXPECTED[name]
    assert_same(evaluate(f"{name}/{expected['checkpoint']}"), expected["evaluation"]["checkpoint"], "checkpoint")
    if name in FINISHED:
        assert_same(evaluate(name), expected["evaluation"]["run"], "run")


def test_an_adapter_is_loaded_with_its_base(runs):
    model, processor = hf_dissect.load_model_and_processor(name_or_path="mola/checkpoint-5")
    config = model.peft_config["default"]
    assert isinstance(config, hf_dissect.MolaConfig) and (config.num_experts, config.variant) == (2, "router")
    assert processor.tokenizer("a red circle")["input_ids"]
    loaded = {name.replace(".default", ""): values for name, values in model.state_dict().items()}
    base = load_file("mola/checkpoint-5/base_model/model.safetensors")
    saved = load_file("mola/checkpoint-5/adapter_model.safetensors")
    experts = {name: values for name, values in saved.items() if "mola" in name}
    assert experts and all(torch.equal(loaded[name], values) for name, values in experts.items())
    assert torch.equal(model.base_model.model.text_projection.weight, base["text_projection.weight"])


def test_the_pairs_of_a_run_are_audited(runs):
    assert main(["audit", "selection", "--ledger", "selection", "--output-dir", "audit"]) == 0
    tables = [pq.read_table(path) for path in Path("audit").glob("*.parquet")]
    assert [table.num_rows for table in tables] == [64]


# ---- publishing ----


@pytest.mark.parametrize("name", FINISHED)
def test_a_run_is_published_and_evaluated_from_the_hub(name, hub, runs):
    assert main(["push", name, "ada/earlier"]) == 0
    files = hub.model("ada/earlier").files
    assert files.keys() == PUBLISHED[name]
    assert not [path for path, content in files.items() if str(runs).encode() in content]
    saved = load_file(f"{name}/model.safetensors")
    loaded = (CLIPModel if name == "selection" else AutoModel).from_pretrained("ada/earlier").state_dict()
    assert all(torch.equal(loaded[key], values) for key, values in saved.items())
    data = ["--data", "arrays.npz"] if name == "distillation" else []
    assert_same(evaluate("hub:ada/earlier", *data), EXPECTED[name]["evaluation"]["run"], "figures")


# ---- recipe and ledger ----


@pytest.mark.parametrize("name", FINISHED)
def test_a_run_is_repeated_from_its_recipe(name, runs):
    assert main(["train", f"{name}/recipe.yaml"]) == 0
    metrics = json.loads(Path(f"{name}-2/metrics.json").read_text())
    assert_same({key: metrics[key] for key in EXPECTED[name]["metrics"]}, EXPECTED[name]["metrics"], "metrics")


def test_a_recipe_is_read_and_written_back_the_same(runs):
    for path in ("selection/recipe.yaml", "mola/checkpoint-5/recipe.yaml"):
        recipe = hf_dissect.Recipe.load(path)
        recipe.save("again.yaml")
        assert_kept(yaml.safe_load(Path("again.yaml").read_text()), yaml.safe_load(Path(path).read_text()))
        # Settings that are younger than the run have their defaults, by which it was made.
        settings, defaults = dataclasses.asdict(recipe.data), dataclasses.asdict(DataSection())
        younger = defaults.keys() - yaml.safe_load(Path(path).read_text())["data"].keys()
        assert younger and all(settings[name] == defaults[name] for name in younger)


def assert_kept(written: dict, given: dict) -> None:
    """Compare settings with those of an earlier version, which had no others."""
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(written[key], dict) and key != "config":
            assert_kept(written[key], value)
        else:
            assert written[key] == value, key


def test_a_ledger_is_read(runs):
    tensors = load_file("selection/ledger.safetensors")
    names = tuple(name.removeprefix("column.") for name in tensors)
    ledger = hf_dissect.SampleLedger(64, columns=names)
    assert ledger.load("selection/ledger.safetensors") == {"epoch": 3, "strategy": "dissect"}
    for name in names:
        torch.testing.assert_close(ledger.column(name), tensors[f"column.{name}"], rtol=0, atol=0, equal_nan=True)
    assert not ledger.column("history").isnan().any()


@pytest.mark.parametrize("source", ["selection/checkpoint-10", "hub:ada/scores"])
def test_a_ledger_begins_another_run(source, runs, hub):
    if source.startswith("hub:"):
        assert main(["push-ledger", "selection", "ada/scores"]) == 0
    given = [f"selection.ledger={source}", "selection.warmup_epochs=0", "training.max_steps=1"]
    assert main(["train", "selection/recipe.yaml", *given, "--output-dir", "other"]) == 0
    # The run of one step, without a warm-up, selects by the history that it was given, and leaves it as it is.
    for place in (runs / "other", runs / "selection/checkpoint-10"):
        assert read_columns(place)["column.history"] == read_columns(runs / "selection")["column.history"]


def test_a_comparison_takes_over_the_run(runs, capsys):
    Path("all").mkdir()
    shutil.move("selection", "all/dissect-seed2")
    path = Path("all/dissect-seed2/recipe.yaml")
    settings = yaml.safe_load(path.read_text())
    settings["training"]["output_dir"] = "all/dissect-seed2"
    path.write_text(yaml.safe_dump(settings))
    given = ["--strategies", "dissect", "--seeds", "2", "--output-dir", "all", "--resume"]
    assert main(["compare", str(path), *given]) == 0
    assert "[1/1] dissect: finished before" in capsys.readouterr().out
    (row,) = json.loads(Path("all/metrics.json").read_text())["table"]
    final = json.loads(Path("all/dissect-seed2/metrics.json").read_text())["final"]
    assert row["recall_sum"]["mean"] == pytest.approx(final["recall_sum"])
    assert "dissect" in Path("all/report.html").read_text()
