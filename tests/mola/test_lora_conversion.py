"""PEFT converts the expert of a fixed task to a LoRA that it loads without this package, with equal outputs."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from testing.tiny_bases import (
    adapted,
    pictures,
    tiny_bert,
    tiny_bert_classifier,
    tiny_convnext,
    tiny_gpt2,
    tiny_resnet,
    tokens,
)
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from torch import nn

from hf_dissect.mola import MolaConfig, MolaLayer, mola_routing

TASK = 1
LOAD = """
import sys
import torch, transformers
from peft import PeftModel
for folder in sys.argv[1:]:
    found = torch.load(folder + "/expected.pt")
    base = getattr(transformers, found["class"]).from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/lora").eval()
    with torch.no_grad():
        outputs = model(**found["batch"])
    for name, expected in found["outputs"].items():
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-4, msg=lambda text: folder + text)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**found["batch"])[name], expected, rtol=1e-4, atol=1e-4)
assert "hf_dissect" not in sys.modules
print("all equal")
"""


def clip_with_inputs():
    model, processor = tiny_clip()
    return model, tiny_inputs(model, processor, CAPTIONS[:4])


def cases():
    patterns = {"rank_pattern": {"q_proj": 4, "fc1": 1}, "alpha_pattern": {"fc2": 2.0, "q_proj": 5.0}}
    transposed = {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_attn": 3}}
    dense = {"target_modules": ["pwconv1", "pwconv2"]}
    yield "clip", *clip_with_inputs(), patterns, 4, ["image_embeds", "text_embeds", "logits_per_image"]
    yield "bert", tiny_bert(), tokens(), {"alpha": 3, "r": 4, "dropout": 0.1}, 4, ["last_hidden_state"]
    yield "bert-regex", tiny_bert(), tokens(), {"target_modules": r".*layer\.1.*(query|dense)"}, 2, ["pooler_output"]
    yield "bert-threshold", tiny_bert(), tokens(), {"target_modules": "all-linear"}, 1.0, ["last_hidden_state"]
    yield "gpt2", tiny_gpt2(), tokens(), transposed, 3, ["last_hidden_state"]
    yield "convnext", tiny_convnext(), pictures(), dense, 2, ["last_hidden_state"]


def test_peft_alone_loads_a_converted_expert_with_equal_outputs(tmp_path):
    folders = []
    for name, base, batch, fields, rank, outputs in cases():
        folder = tmp_path / name
        base.save_pretrained(folder / "base")
        model = adapted(base, variant="grad", **fields)
        with torch.no_grad():
            expected = model(**batch, task_ids=torch.full((4,), TASK))
            mean = model(**batch)
        assert (expected[outputs[0]] - mean[outputs[0]]).abs().max() > 1e-3
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.set_task(TASK)
        assert model.supports_lora_conversion()
        save_as_lora(folder / "lora", model, rank=rank)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        config = json.loads((folder / "lora" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        found = {"class": type(base).__name__, "batch": batch, "outputs": {key: expected[key] for key in outputs}}
        torch.save(found, folder / "expected.pt")
        folders.append(str(folder))
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


def test_the_rank_of_an_expert_is_exact_and_a_lower_one_is_not():
    model = adapted(tiny_bert(), variant="grad", r=4)
    model.set_task(TASK)
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    A, B = layer.mola_A["default"][TASK], layer.mola_B["default"][TASK]
    key = "base_model.model.encoder.layer.0.attention.self.query.lora_{}.weight"
    errors = []
    for rank in (4, 8, 3):
        config, weights = convert_to_lora(model, rank=rank)
        assert config.r == config.lora_alpha == rank
        errors.append((weights[key.format("B")] @ weights[key.format("A")] - 16 / 4 * B @ A).abs().max())
    assert errors[0] < 1e-5 and errors[1] < 1e-5 < 1e-3 < errors[2]


def test_the_default_task_and_each_of_two_adapters():
    model = adapted(tiny_bert(), variant="grad", default_task=2, target_modules=["query", "key"])
    model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, r=3, init_weights=False))
    model.base_model.set_task(0, "second")
    batch = tokens()
    for name, rank in (("default", 2), ("second", 3)):
        model.set_adapter(name)
        config, weights = convert_to_lora(model, rank=rank, adapter_name=name)
        lora = get_peft_model(tiny_bert(), config).eval()
        assert not set_peft_model_state_dict(lora, weights).unexpected_keys
        with torch.no_grad():
            torch.testing.assert_close(
                lora(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=1e-4, atol=1e-4
            )


def test_modules_to_save_are_taken_along(tmp_path):
    model = adapted(tiny_bert_classifier(), variant="grad", modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(-3)
    model.set_task(TASK)
    save_as_lora(tmp_path, model, rank=2)
    lora = PeftModel.from_pretrained(tiny_bert_classifier(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(lora(**tokens()).logits, model(**tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_precision_stay_so(dtype):
    config = MolaConfig(variant="grad", num_experts=3, r=2, init_weights=False)
    model = get_peft_model(tiny_bert().to(dtype), config, autocast_adapter_dtype=False).eval()
    model.set_task(TASK)
    _, weights = convert_to_lora(model, rank=2)
    assert {weight.dtype for weight in weights.values()} == {dtype}


def folder_is_empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (tiny_bert, {}, r"choose the one to merge with `set_task\(task\)`, a task from 0 to 2"),
        (tiny_resnet, {"default_task": 0}, r"'default' adapts Conv2d, .*set_task\(task\), merge_and_unload\(\)"),
        (
            tiny_convnext,
            {"default_task": 0, "target_modules": ["dwconv", "pwconv1"]},
            r"'default' adapts Conv2d, .*set_task\(task\), merge_and_unload\(\)",
        ),
        (tiny_bert, {"default_task": 0, "train_base": "targets"}, "was trained with train_base.*merge_and_unload"),
        (tiny_bert, {"default_task": 0, "train_base": "all"}, "was trained with train_base.*merge_and_unload"),
        (tiny_bert, {"default_task": 0, "task_norms": True}, "was trained with task_norms.*merge_and_unload"),
        (tiny_bert, {"default_task": 0, "bias": "mola_only"}, "The adapter's config sets bias=mola_only"),
        (tiny_bert, {"variant": "router"}, "do not support LoRA conversion"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has a router")
@pytest.mark.filterwarnings("ignore:.*adapter with a router")
def test_what_a_lora_cannot_express_is_refused_and_nothing_is_written(base, fields, message, tmp_path):
    model = adapted(base(), **{"variant": "grad"} | fields)
    with pytest.raises((TypeError, ValueError), match=message):
        save_as_lora(tmp_path / "lora", model, rank=2)
    assert folder_is_empty(tmp_path / "lora")
    if "bias" not in fields and fields:  # without a task, it could be converted
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.supports_lora_conversion() is False


def test_the_trained_temperature_is_refused():
    model = adapted(tiny_clip()[0], variant="grad", default_task=0, train_logit_scale=True)
    with pytest.raises(TypeError, match="was trained with train_logit_scale"):
        convert_to_lora(model, rank=2)


def test_a_router_says_why():
    model = adapted(tiny_bert(), variant="router")
    with pytest.warns(UserWarning, match="'default' has a router.*Only adapters with variant='grad'"):
        assert next(m for m in model.modules() if isinstance(m, MolaLayer)).supports_lora_conversion() is False
    mixed = adapted(tiny_bert(), variant="grad", default_task=0)
    mixed.add_adapter("routed", MolaConfig(num_experts=2))
    with (
        pytest.warns(UserWarning, match="adapter with a router.*load that one alone"),
        pytest.raises(TypeError, match="do not support LoRA conversion"),
    ):
        convert_to_lora(mixed, rank=2)


def test_an_adapter_that_does_not_exist():
    with pytest.raises(TypeError, match="no adapter 'other' to convert; the model has default"):
        convert_to_lora(adapted(tiny_bert(), variant="grad", default_task=0), rank=2, adapter_name="other")


def test_a_model_that_loads_its_adapter_itself(tmp_path):
    adapted(tiny_bert(), variant="grad").save_pretrained(tmp_path)
    base = tiny_bert()
    base.load_adapter(str(tmp_path), adapter_name="mine")
    mola_routing(base).fixed_task["mine"] = TASK
    config, weights = convert_to_lora(base, rank=2, adapter_name="mine")
    assert isinstance(config, LoraConfig) and len(weights) == 2 * sum(isinstance(m, MolaLayer) for m in base.modules())


def test_switching_adapters_without_routers():
    """The routing is no module of the model then; it follows all the same."""
    model = adapted(tiny_bert(), variant="grad", default_task=0)
    model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, init_weights=False, default_task=1))
    routing = mola_routing(model)
    assert routing is not None and not any(module is routing for module in model.modules())
    model.set_adapter("second")
    assert routing.active_adapters == ["second"] and not routing.disable_adapters
    with model.disable_adapter():
        assert routing.disable_adapters
    assert not routing.disable_adapters
    model.delete_adapter("default")
    assert list(routing.mola_config) == ["second"]
    model.add_adapter("routed", MolaConfig(num_experts=2))
    assert mola_routing(model) is routing and any(module is routing for module in model.modules())
    model.unload()
    assert not hasattr(model.base_model.model, "_mola")


def test_the_routing_is_switched_off_with_the_last_layer_only():
    model = adapted(tiny_bert(), variant="grad", default_task=0)
    routing = mola_routing(model)
    layers = [module for module in model.modules() if isinstance(module, MolaLayer)]
    for layer in layers:
        assert not routing.disable_adapters
        layer.enable_adapters(False)
    assert routing.disable_adapters
    layers[-1].enable_adapters(True)
    assert not routing.disable_adapters
    model.train()
    assert routing.training
    model.eval()
    assert not routing.training


def test_an_attention_is_refused():
    base = nn.TransformerEncoderLayer(16, 2, 24)
    model = adapted(base, variant="grad", default_task=0, target_modules=["self_attn", "linear1"])
    with pytest.raises(TypeError, match="adapts MultiheadAttention.*merge_and_unload"):
        convert_to_lora(model, rank=2)
    assert not model.supports_lora_conversion()
