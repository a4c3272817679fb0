"""The benchmarks that the documentation rests on run, on sizes too small to measure anything."""

import importlib
import json
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, concatenate_datasets
from testing import tiny_models

from hf_dissect import make_scenes
from hf_dissect.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_main(name: str, *arguments: object) -> None:
    """Call the main function of a benchmark in this process, which has imported already what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", [str(part) for part in (BENCHMARKS / f"{name}.py", *arguments)])
        module = importlib.import_module(name)
        if hasattr(module, "get_context"):  # workers that have imported already what they need, too
            patch.setattr(module, "get_context", lambda method: multiprocessing.get_context("fork"))
        module.main()


def run_script(name: str, *arguments: object) -> None:
    """Run a benchmark in a process of its own."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


def run_benchmark(name: str, *arguments: object, run=run_main) -> dict:
    output = Path(f"{name}.json").resolve()
    run(name, *arguments, "--output", output)
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Restore what a benchmark sets for its whole process."""
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(1)
    transformers.utils.logging.enable_progress_bar()
    logging.disable(logging.NOTSET)


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


def test_noisy_correspondence():
    random = np.random.default_rng(0)
    for split, count in {"train": 32, "validation": 8, "test": 8}.items():
        rows = tiny_models.tiny_pairs(count, captions_per_image=5)
        rows.add_column("image_id", list(range(count))).to_parquet(f"{split}.parquet")
    features = {split: random.normal(size=(count, 1024)) for split, count in {"train": 32, "test": 8}.items()}
    np.savez("mobilenet_v1_features.npz", **features, validation=features["test"])
    order = np.arange(160).reshape(32, 5)
    order[:12] = np.roll(order[:12], 1, axis=0)
    np.save("caption_order_noise40.npy", order.ravel().astype(np.int32))
    small = ["training.num_train_epochs=2", "training.per_device_train_batch_size=32", "model.vocab_size=600"]
    arguments = ["--data", ".", "--noise", 40, "--seeds", 0, *(part for pair in small for part in ("--set", pair))]
    results = run_benchmark("noisy_correspondence", *arguments, "--methods", "none,oracle")
    assert [run["steps"] for run in results["runs"]] == [10, 10]
    results = run_benchmark("noisy_correspondence", *arguments, "--methods", "none,ncr,gsc+")
    found = {run["method"]: run for run in results["runs"]}
    assert list(found) == ["none", "oracle", "ncr", "gsc+"]  # the first is not repeated
    assert all(len(run["epochs"]["test"]) == 2 and 0 <= run["last"] <= 600 for run in found.values())
    assert found["gsc+"]["detection"] == found["gsc+"]["label_auroc"]
    assert found["ncr"]["detection"] == found["ncr"]["p_clean_auroc"]


def test_selection_efficiency():
    rows = tiny_models.tiny_pairs(32, captions_per_image=5).rename_column("caption", "captions")
    rows.to_parquet("train.parquet")
    np.savez("mobilenet_v1_features.npz", train=np.random.default_rng(0).normal(size=(32, 1024)).astype(np.float16))
    arguments = ["--data", ".", "--pairs", 32, "--batch", 16, "--epochs", 3, "--ratios", 0.5, "--m", 4]
    results = run_benchmark("selection_efficiency", *arguments)
    for kind in ("photographs", "features"):
        naive, planned = (results[kind]["0.5"][name] for name in ("every candidate scored", "m = 4"))
        assert naive["steady"]["forwards"] == 0.6 and naive["whole"]["loaded"] == 1
        assert planned["steady"]["loaded"] < 1 and 0.6 < planned["steady"]["forwards"] <= 1
        assert planned["whole"]["efficiency"] > 0 and planned["whole"]["loading"] > 0


def test_audit_scores():
    tower = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
    settings = [
        f"model.config.vision_config={tower}, image_size: 32, patch_size: 16}}",
        f"model.config.text_config={tower}, max_position_embeddings: 32}}",
        "data.scenes_train=64",
        "data.scenes_validation=8",
        "data.scenes_test=8",
        "training.num_train_epochs=1",
        "training.per_device_train_batch_size=32",
    ]
    results = run_benchmark("audit_scores", *settings, "--seeds", 1, "--pairs", 40)
    assert "auroc_score" not in results["0% mismatched"] and 0 <= results["40% mismatched"]["auroc_score"]["mean"] <= 1


def test_audit_fit():
    rows = make_scenes(60, captions_per_image=5)
    rows.to_parquet("train.parquet")
    np.savez("features.npz", train=np.random.default_rng(0).normal(size=(60, 8)).astype(np.float16))
    np.save("caption_order_noise40.npy", np.roll(np.arange(300), 5))
    arguments = ["--data", ".", "--features", "features.npz", "--noise", "noise40", "--seeds", 1, "--models", 1]
    found = run_benchmark("audit_fit", *arguments, "--epochs", 1)["noise40"]
    assert found["mismatched"]["mean"] == 1 and found["interval_high"]["mean"] > 0.9 and found["minutes"]["mean"] < 1


@pytest.mark.slow
def test_grad_cache():
    """Start a process for each measurement of memory, each of which imports torch."""
    results = run_benchmark("grad_cache", "--chunk", 4, "--factors", 2, "--repeats", 1)
    cached, plain = results["grad_cache"]["2x"], results["plain"]["2x"]
    assert cached["inputs_mib"] == plain["inputs_mib"] > 0 and cached["batch"] == 8
    assert cached["seconds_per_step"]["mean"] > 0 and plain["processor_seconds_per_step"]["mean"] > 0


@pytest.mark.slow
def test_scaling():
    """Start torchrun twice."""
    results = run_benchmark("scaling", "--processes", 1, "--steps", 3, "--batch", 8, "--pairs", 32, "--quiet")
    assert {run["scope"] for run in results["measured"]} == {"local", "global"}
    assert all(run["processor_ms"] > 0 and run["feature exchange"] == 0 for run in results["measured"])
    assert [len(parts) for parts in results["paper"].values()] == [8] * 4


def test_gsc_cost():
    results = run_benchmark("gsc_cost", "--batch", 8, "--dim", 16, "--rounds", 1)
    assert results["loss_alone"]["contrastive"]["processor"]["ratio_to_contrastive_median"] == 1
    assert results["loss_alone"]["gsc without evidence"]["processor"]["ms_per_step_median"] > 0


@pytest.mark.slow
def test_mola_cost():
    """Start a process for each measurement of memory, each of which imports torch."""
    results = run_benchmark("mola_cost", "--model", "tiny-clip", "--rounds", 1, "--batch", 4, "--r", 2)
    lora, grad = results["lora"], results["mola-grad"]
    assert (
        grad["trainable_parameters"] == lora["trainable_parameters"] < results["mola-router"]["trainable_parameters"]
    )
    assert lora["processor"]["ratio_to_lora_median"] == 1 and grad["process_mib_ratio"] > 0


@pytest.mark.slow
def test_mola_pacs():
    """Start workers, each of which imports torch."""
    for split in ("train", "validation"):
        parts = []
        for domain in range(2):
            rows = make_scenes(14, seed=domain, split=split).select_columns("image")
            parts.append(rows.add_column("label", [0, 1] * 7).add_column("domain", [domain] * 14))
        names = ClassLabel(names=["first", "second"])
        concatenate_datasets(parts).cast_column("domain", names).to_parquet(f"{split}.parquet")
    small = ["--side", 16, "--widths", "4,4,8", "--depths", "1,1", "--ranks", "1,2", "--epochs", 1, "--batch", 7]
    methods = ["hard-sharing", "mola-grad", "mola-router+twd"]
    results = run_benchmark(
        "mola_pacs",
        "--data",
        ".",
        *small,
        "--seeds",
        "0,1",
        "--methods",
        ",".join(methods),
        "--timing-rounds",
        1,
        run=run_script,
    )
    assert list(results["methods"]) == methods and len(results["runs"]) == 6
    assert all(0 <= row["accuracy"]["mean"]["mean"] <= 1 for row in results["methods"].values())
    assert results["methods"]["hard-sharing"]["ratio"] == 1


def test_amid_utd_mhad():
    random = np.random.default_rng(0)
    subject = np.arange(64) % 8 + 1
    np.savez(
        "utd.npz",
        depth=random.integers(0, 255, (64, 2, 12, 16), dtype=np.uint8),
        skeleton=random.normal(size=(64, 8, 20, 3)).astype(np.float32),
        inertial=random.normal(size=(64, 8, 6)).astype(np.float32),
        action=np.arange(64) // 8 % 4,
        subject=subject,
        trial=np.arange(64) // 32 + 1,
    )
    small = ["training.num_train_epochs=1", "training.per_device_train_batch_size=8", "training.logging_steps=1"]
    small += ["training.logging_strategy=steps", "student.config.shift=1", "student.config.grid=[1, 1]"]
    methods = ["student", "mi_student_only", "amid", "amid without conditional_entropy"]
    arguments = ["--data", ".", "--seeds", "0", *(part for pair in small for part in ("--set", pair))]
    results = run_benchmark("amid_utd_mhad", *arguments, "--methods", ",".join(methods))
    assert list(results["methods"]) == methods
    assert "teacher" not in results["methods"]["student"] and "teacher" in results["methods"]["amid"]
    assert all(0 <= run["R@1"] <= 1 and 0 <= run["student"] <= 1 for run in results["runs"])
    diagnostics = [set(run["diagnostics"]) for run in results["runs"]]
    assert diagnostics[0] == set() and "discriminator_accuracy" in diagnostics[2] - diagnostics[3]
    assert "information_student_test_rows" in diagnostics[1] & diagnostics[2] & diagnostics[3]
    assert "generator_error_train_rows" in diagnostics[2] - diagnostics[3]
    assert results["recipe"]["data"]["train_groups"] == [1, 3, 5]
    again = run_benchmark("amid_utd_mhad", *arguments, "--methods", "student,hinton")
    assert again["runs"][:-1] == results["runs"] and again["runs"][-1]["method"] == "hinton"
    Path("amid_utd_mhad.json").unlink()
    few = run_benchmark("amid_utd_mhad", *arguments, "--methods", "mi_student_only", "--labelled-trials", 1)
    assert few["labelled_trials"] == 1 and few["runs"][0]["student"] <= 1


@pytest.mark.slow
def test_faults():
    """Train a dozen times, and start from a process without threads."""
    run_script("faults", "--trials", 1, "--faults", "kill,nan", "--output-dir", ".")
    rows = json.loads(Path("results/faults.json").read_text())["faults"]
    assert [row["fault"] for row in rows] == ["kill -9", "NaN in a weight or in the loss"]
    assert all(row["tried"] == 1 and row["differ"] == 0 and row["resumed_from_older"] == 0 for row in rows)
    assert "| kill -9 | 1 |" in Path("faults.md").read_text()
