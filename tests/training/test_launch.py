"""A recipe runs the same however it is launched, and accelerate reads the configurations that are shipped."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.test_utils import execute_subprocess_async
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from testing.tiny_recipe import write_tiny_recipe

from hf_dissect import DissectTrainingArguments
from hf_dissect.cli import main
from hf_dissect.recipe.launch_configs import read_summary, shipped_launch_configs

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
KIND = {
    "single-gpu": "NO",
    "multi-gpu": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed-zero2": "DEEPSPEED",
    "multi-node": "MULTI_GPU",
}


def launch(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    execute_subprocess_async([sys.executable, "-m", *command], env=environment, timeout=300, echo=False)


def parsed(config: Path, *arguments: str):
    """What `accelerate launch` makes of a configuration."""
    command = ["--config_file", str(config), *arguments, "-m", "hf_dissect.cli", "train", "quickstart"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


@pytest.mark.slow
def test_one_process_accelerate_and_torchrun_leave_the_same_run_folder(tmp_path, capsys):
    """Start accelerate and torchrun, each with two processes."""
    settings = {"bf16": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "use_cpu": None}
    recipe = str(write_tiny_recipe(tmp_path / "tiny.yaml", training=settings))
    assert main(["recipes", "--accelerate", "multi-gpu"]) == 0
    config = tmp_path / "multi-gpu.yaml"
    config.write_text(capsys.readouterr().out)

    train = ["hf_dissect.cli", "train", recipe, "--output-dir"]
    assert main([*train[1:], str(tmp_path / "alone"), "training.use_cpu=true"]) == 0
    # Of several processes that find no GPU, none may believe to be alone.
    accelerate = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", "-m"]
    launch([*accelerate, *train, str(tmp_path / "accelerate")])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    launch([*torchrun, *train, str(tmp_path / "torchrun")])

    folders = [tmp_path / name for name in ("alone", "accelerate", "torchrun")]
    # Each process has its own random state to go on from.
    files = [sorted(path.name for path in folder.rglob("*") if "rng_state" not in path.name) for folder in folders]
    assert files[0] == files[1] == files[2] and {"README.md", "report.html", "checkpoint-4"} <= set(files[0])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert all(figures["steps"] == 4 and figures["settings"]["bf16"] is True for figures in metrics)
    # Two processes see twice as many pairs in as many steps as one, whoever launched them.
    states = [json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text()) for folder in folders]
    assert [state["epoch"] for state in states] == [1, 2, 2]
    for file in ("model.safetensors", "ledger.safetensors"):
        one, other = (load_file(folder / file) for folder in folders[1:])
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    assert metrics[1]["final"] == metrics[2]["final"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(config):
    assert load_config_from_file(str(config)).distributed_type == KIND[config.stem]
    arguments = parsed(config)
    expected = {"single-gpu": 1, "multi-node": 16}.get(config.stem, 8)
    assert arguments.num_processes == expected and arguments.mixed_precision == "no"
    assert parsed(config, "--num_processes", "2").num_processes == 2


def test_fsdp2_wraps_blocks_and_saves_whole_models():
    environment = prepare_multi_gpu_env(parsed(shipped_launch_configs()["fsdp2"]))
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # the model's own


def test_deepspeed_leaves_clipping_and_accumulation_to_the_recipe():
    arguments = parsed(shipped_launch_configs()["deepspeed-zero2"])
    arguments.deepspeed_fields_from_accelerate_config = ""  # as `launch_command` sets it
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def test_several_machines_are_given_on_the_command_line():
    config = shipped_launch_configs()["multi-node"]
    arguments = parsed(
        *(config, "--num_machines", "4", "--num_processes", "32"),
        *("--machine_rank", "3", "--main_process_ip", "10.0.0.1", "--main_process_port", "29511"),
    )
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("4", "8", 3)
    assert arguments.rdzv_endpoint == "10.0.0.1:29511"


def test_the_precision_of_the_recipe_wins_over_that_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as accelerate launch passes it on
    assert DissectTrainingArguments(str(tmp_path), bf16=True, use_cpu=True).mixed_precision == "bf16"
    assert DissectTrainingArguments(str(tmp_path), use_cpu=True).mixed_precision == "fp16"


def test_the_command_lists_and_prints_the_configurations(capsys):
    assert main(["recipes", "--accelerate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(KIND) == list(shipped_launch_configs())
    assert lines[-1].endswith("One GPU, one process.") and all(map(read_summary, CONFIGS))
    for config in CONFIGS:
        assert main(["recipes", "--accelerate", config.stem]) == 0
        assert capsys.readouterr().out == config.read_text(encoding="utf-8")
    assert main(["recipes", "--accelerate", "quickstart"]) == 2
    assert "no such accelerate configuration; shipped are deepspeed-zero2, fsdp2" in capsys.readouterr().err
    assert main(["recipes", "multi-gpu"]) == 2
