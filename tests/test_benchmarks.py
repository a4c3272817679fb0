"""The benchmarks that the README rests on run, on sizes too small to measure anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dissect.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_benchmark(name: str, *arguments: object) -> dict:
    output = Path(f"{name}.json").resolve()
    command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments, "--output", output]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_ledger():
    results = run_benchmark("ledger", "--pairs", 5000, "--batch", 64, "--repeats", 3)
    assert results["row_numbers"]["bytes_per_pair_and_column"] == 4
    assert results["row_numbers"]["read_ms_median"] > 0 and results["hashed_ids"]["write_ms_p99"] > 0


def test_step_overhead():
    results = run_benchmark("step_overhead", "--rounds", 1, "--steps", 1, "--batch", 4)
    assert results["plain Trainer"]["wall"]["ratio_to_plain_median"] == 1
    assert results["none"]["processor"]["ms_per_step_median"] > 0


def test_differential():
    tower = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
    settings = [
        f"model.config.vision_config={tower}, image_size: 32, patch_size: 16}}",
        f"model.config.text_config={tower}, max_position_embeddings: 32}}",
        "data.scenes_train=64",
        "data.scenes_validation=8",
        "data.scenes_test=8",
        "evaluation.zero_shot=null",
        "selection.strategy=none",
        "selection.options={}",
        "selection.record=true",
        "training.num_train_epochs=3",
        "training.per_device_train_batch_size=32",
    ]
    assert main(["train", "quickstart", *settings, "--output-dir", "run"]) == 0
    results = run_benchmark("differential", "run")
    assert {warmup: list(row) for warmup, row in results["differential"].items()} == {"1": ["1", "2"], "2": ["2"]}
    assert all(0 <= auroc <= 1 for auroc in results["correlation"].values())
