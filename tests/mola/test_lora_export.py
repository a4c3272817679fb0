"""An exported expert must be a LoRA adapter that PEFT alone loads, with equal outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from testing.tiny_bases import (
    adapted,
    pictures,
    tiny_bert,
    tiny_convnext,
    tiny_gpt2,
    tiny_regnet,
    tiny_resnet,
    tokens,
)
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from torch import nn

TASK = 1
LOAD = """
import sys
import torch, transformers
from peft import PeftModel
for folder in sys.argv[1:]:
    found = torch.load(folder + "/expected.pt")
    base = getattr(transformers, found["class"]).from_pretrained(folder + "/base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, folder + "/lora").eval()
    with torch.no_grad():
        outputs = model(**found["batch"])
    for name, expected in found["outputs"].items():
        error = (outputs[name] - expected).abs().max()
        assert error < 1e-8, f"{folder}: {name} differs by {error}"
    if "regnet" in folder:
        continue  # PEFT does not merge grouped convolutions
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert (merged(**found["batch"])[name] - expected).abs().max() < 1e-8
assert "hf_dissect" not in sys.modules
print("all equal")
"""


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def clip_with_inputs():
    model, processor = tiny_clip()
    return model, tiny_inputs(model, processor, CAPTIONS[:4])


def cases():
    patterns = {"rank_pattern": {"q_proj": 4, "fc1": 1}, "alpha_pattern": {"fc2": 2.0, "q_proj": 5.0}}
    transposed = {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_attn": 3}}
    yield "clip", *clip_with_inputs(), patterns, ["image_embeds", "text_embeds", "logits_per_image"]
    yield "bert", tiny_bert(), tokens(), {"alpha": 3, "r": 4, "dropout": 0.1}, ["last_hidden_state"]
    yield "gpt2", tiny_gpt2(), tokens(), transposed, ["last_hidden_state"]
    yield "resnet", tiny_resnet(), pictures(), {}, ["last_hidden_state"]
    yield "regnet", tiny_regnet(), pictures(), {"target_modules": ["convolution"]}, ["last_hidden_state"]


def test_peft_alone_loads_an_exported_expert_with_equal_outputs(tmp_path):
    folders = []
    for name, base, batch, fields, outputs in cases():
        folder = tmp_path / name
        base = base.double()
        base.save_pretrained(folder / "base")
        model = adapted(base, variant="grad", **fields)
        batch = double(batch)
        with torch.no_grad():
            expected = model(**batch, task_ids=torch.full((4,), TASK))
            mean = model(**batch)
        assert (expected[outputs[0]] - mean[outputs[0]]).abs().max() > 1e-3
        model.export_task_as_lora(TASK, str(folder / "lora"))
        found = {"class": type(base).__name__, "batch": batch, "outputs": {name: expected[name] for name in outputs}}
        torch.save(found, folder / "expected.pt")
        folders.append(str(folder))
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


def test_the_exported_folder_is_an_ordinary_lora(tmp_path):
    model = adapted(tiny_bert(), variant="grad", rank_pattern={"query": 4}, alpha_pattern={"key": 1.5})
    model.export_task_as_lora(0, tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads(Path(tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert {name.rpartition(".")[2]: rank for name, rank in config["rank_pattern"].items()} == {"query": 4}
    assert {name.rpartition(".")[2]: alpha for name, alpha in config["alpha_pattern"].items()} == {
        "key": 1.5,
    }


def test_exporting_leaves_the_model_as_it_is(tmp_path):
    model = adapted(tiny_bert(), variant="grad")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.export_task_as_lora(2, str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training is False and all(p.requires_grad for n, p in model.named_parameters() if "mola_" in n)


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({"variant": "router"}, 0, "'default' has a router, whose weights depend on the input"),
        ({}, 3, "task=3: adapter 'default' has the tasks 0 to 2"),
        ({}, -1, "task=-1: adapter 'default' has the tasks 0 to 2"),
        ({}, True, "task=True: adapter 'default' has the tasks 0 to 2"),
        ({}, None, "task=None: adapter 'default' has the tasks 0 to 2"),
        ({"train_base": "targets"}, 0, "was trained with train_base: a LoRA of its experts alone would not"),
        ({"train_base": "all"}, 0, "was trained with train_base.*merge_and_unload"),
        ({"bias": "mola_only"}, 0, "was trained with bias"),
        ({"modules_to_save": ["pooler"]}, 0, "was trained with modules_to_save"),
    ],
)
def test_what_a_lora_cannot_express_is_refused(fields, task, message, tmp_path):
    model = adapted(tiny_bert(), **{"variant": "grad"} | fields)
    with pytest.raises(ValueError, match=message):
        model.export_task_as_lora(task, str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("fields", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_convolutions_that_peft_would_compute_otherwise_are_refused(fields, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3, **fields)

        def forward(self, x):
            return self.convolution(x)

    model = adapted(Net(), variant="grad", target_modules=["convolution"])
    with pytest.raises(ValueError, match="convolution has dilation=.*which PEFT's LoRA does not carry over"):
        model.export_task_as_lora(0, str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def test_a_depthwise_convolution_beside_dense_layers_is_exported(tmp_path):
    base = tiny_convnext().double()
    model = adapted(base, variant="grad", target_modules=["patch_embeddings", "dwconv", "pwconv1", "pwconv2"])
    batch = pictures(dtype=torch.float64)
    expected = model(**batch, task_ids=torch.full((4,), TASK)).last_hidden_state
    model.export_task_as_lora(TASK, str(tmp_path))
    lora = PeftModel.from_pretrained(tiny_convnext().double(), str(tmp_path)).eval()
    assert (lora(**batch).last_hidden_state - expected).abs().max() < 1e-8
