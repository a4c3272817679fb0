"""FSDP2, as the shipped configuration has it: weights in parts, global selection, GradCache, a whole model saved."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.test_utils import execute_subprocess_async
from safetensors.torch import load_file
from testing.tiny_recipe import write_tiny_recipe
from transformers import AutoModel

ROOT = Path(__file__).parents[2]


def train(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")]
    execute_subprocess_async(
        [*launch, str(ROOT / "tests" / "testing" / "fsdp2_on_cpu.py"), "train", *arguments],
        env=environment,
        timeout=300,
        echo=False,
    )


@pytest.mark.slow
def test_a_run_with_fsdp2_leaves_a_whole_model_and_resumes(tmp_path):
    """Start accelerate twice, each time with two processes."""
    recipe = write_tiny_recipe(
        tmp_path / "tiny.yaml",
        selection={"scope": "global", "options": {"variant": "momentum"}},
        objective={"grad_cache_chunk_size": 3},  # of 8 kept pairs
        training={
            **{"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "average_weights": 0.75, "use_cpu": None},
            **{"eval_strategy": "steps", "eval_steps": 2},  # which leaves weights together that training splits
        },
    )
    folder = tmp_path / "run"
    train(str(recipe), "--output-dir", str(folder))
    whole = load_file(folder / "model.safetensors")
    model = AutoModel.from_pretrained(folder)
    assert model.logit_scale.shape == () and torch.equal(model.logit_scale, whole["logit_scale"])
    assert json.loads((folder / "metrics.json").read_text())["final"]["recall_sum"] > 0
    # The final model is the mean of the weights in training, which the checkpoints hold.
    steps = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    for name, weight in whole.items():
        mean = sum(step[name].double() for step in steps) / 3
        torch.testing.assert_close(weight.double(), mean, rtol=1e-6, atol=1e-6)
    assert json.loads((folder / "metrics.json").read_text())["averaged_weights"] == {"steps": 3, "first_step": 2}

    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    train(str(recipe), "--output-dir", str(folder), "--resume")
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
