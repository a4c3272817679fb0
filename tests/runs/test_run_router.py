"""A run keeps the network of its router when it is resumed."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from testing.tiny_recipe import write_tiny_recipe

from hf_dissect.cli import main

ADAPTER = {"type": "mola", "num_experts": 2, "r": 2, "target_modules": ["q_proj"], "router_input": "pixels"}


@pytest.fixture
def earlier(tmp_path):
    """A run that stopped after two of four steps, as an earlier version wrote it, and the weights of its end."""
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    adapter = ADAPTER | {"router_architecture": "resnet20"}
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", training=training, adapter=adapter)
    assert main(["train", str(recipe), "--output-dir", str(tmp_path / "whole")]) == 0
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    checkpoint.parent.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(checkpoint)
    settings = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    del settings["adapter"]["router_architecture"]
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(settings))
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    del config["router_architecture"]
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    return checkpoint, load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")


def test_a_run_of_an_earlier_version_resumes_with_its_network(earlier, tmp_path):
    """Neither its recipe nor the adapter of its checkpoint names the network."""
    checkpoint, expected = earlier
    recipe = str(checkpoint / "recipe.yaml")
    assert main(["train", recipe, "--resume", "--output-dir", str(checkpoint.parent)]) == 0
    made = load_file(checkpoint.parent / "checkpoint-4" / "adapter_model.safetensors")
    assert made.keys() == expected.keys() and any(".blocks.8." in name for name in made)
    assert all(torch.equal(made[name], weights) for name, weights in expected.items())
    # A new run of the same recipe has the default of this version.
    assert main(["train", recipe, "--output-dir", str(tmp_path / "new")]) == 0
    config = json.loads((tmp_path / "new" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["router_architecture"] == "resnet8"


def test_a_run_with_another_network_than_its_checkpoint_is_refused(earlier, capsys):
    checkpoint, _ = earlier
    given = ["adapter.router_architecture=resnet8", "--output-dir", str(checkpoint.parent)]
    assert main(["train", str(checkpoint / "recipe.yaml"), "--resume", *given]) != 0
    assert "holds an adapter of another shape" in capsys.readouterr().err
