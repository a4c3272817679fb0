"""Merging the expert of a task into the base weights, and taking experts out again."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from testing.tiny_bases import (
    adapted,
    pictures,
    tiny_bert,
    tiny_bert_classifier,
    tiny_convnext,
    tiny_gpt2,
    tiny_regnet,
    tiny_resnet,
    tokens,
)
from testing.tiny_models import tiny_clip
from torch import nn

from hf_dissect.mola import MolaConfig, MolaLayer, mola_routing

BASES = {
    "bert": (tiny_bert, tokens, {}),
    "gpt2": (tiny_gpt2, tokens, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "resnet": (tiny_resnet, lambda: pictures(dtype=torch.float64), {}),
    "regnet": (tiny_regnet, lambda: pictures(dtype=torch.float64), {"target_modules": ["convolution"]}),
    "convnext": (
        tiny_convnext,
        lambda: pictures(dtype=torch.float64),
        {"target_modules": ["dwconv", "pwconv1", "pwconv2"]},
    ),
}
TASK = 1


def make(case: str, **fields):
    new_base, inputs, targets = BASES[case]
    base = new_base().double()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, variant="grad", **targets | fields)
    return model, inputs(), weights


def output(model, **batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


def of_task(batch, task=TASK):
    return batch | {"task_ids": torch.full((4,), task)}


def assert_unchanged(model, weights):
    found = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_is_equal_and_unmerged_is_as_before(case, safe_merge):
    model, batch, weights = make(case)
    expected = output(model, **of_task(batch))
    assert (expected - output(model, **of_task(batch, 0))).abs().max() > 1e-3
    model.set_task(TASK)
    model.merge_adapter(safe_merge=safe_merge)
    assert (output(model, **batch) - expected).abs().max() < 1e-10
    assert (output(model, **of_task(batch)) - expected).abs().max() < 1e-10
    model.unmerge_adapter()
    found = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()}
    assert max((found[name] - value).abs().max() for name, value in weights.items()) < 1e-12
    assert (output(model, **of_task(batch, 2)) - output(model, **of_task(batch, 0))).abs().max() > 1e-3
    assert (output(model, **of_task(batch)) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("case", BASES)
def test_merge_and_unload_gives_a_plain_model_with_equal_outputs(case):
    model, batch, weights = make(case)
    expected = output(model, **of_task(batch))
    model.set_task(TASK)
    plain = model.merge_and_unload()
    assert type(plain) is type(BASES[case][0]())
    assert set(plain.state_dict()) == set(weights)
    assert mola_routing(plain) is None and not any(isinstance(module, MolaLayer) for module in plain.modules())
    assert (output(plain, **batch) - expected).abs().max() < 1e-10
    assert not plain._forward_pre_hooks and not plain._forward_hooks


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("fields", [{}, {"variant": "router"}], ids=["grad", "router"])
def test_unload_gives_the_base_model_back(case, fields):
    new_base, inputs, targets = BASES[case]
    base, batch = new_base().double(), inputs()
    expected, names = output(base, **batch), set(base.state_dict())
    plain = adapted(base, **{"variant": "grad"} | fields | targets).unload()
    assert set(plain.state_dict()) == names and mola_routing(plain) is None
    assert torch.equal(output(plain, **batch), expected)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in plain.modules())
    again = adapted(plain, **{"variant": "grad"} | fields | targets)
    output(again, **batch)


def test_a_merged_model_refuses_other_tasks():
    model, batch, _ = make("bert")
    model.set_task(TASK)
    model.merge_adapter()
    for task_ids in (torch.full((4,), 0), torch.tensor([1, 1, 0, 1])):
        with pytest.raises(ValueError, match="task_ids were given while the expert of task 1 is merged.*unmerge"):
            model(**batch, task_ids=task_ids)
    with pytest.raises(ValueError, match="'default' is merged; call `unmerge_adapter"):
        model.set_task(0)
    model.unmerge_adapter()
    model.set_task(0)
    model(**batch, task_ids=torch.tensor([1, 1, 0, 1]))


def test_disabling_a_merged_adapter_unmerges_it():
    model, batch, weights = make("resnet")
    with model.disable_adapter():
        plain = output(model, **batch)
    model.set_task(TASK)
    model.merge_adapter()
    with model.disable_adapter():
        assert (output(model, **batch) - plain).abs().max() < 1e-10
    assert (output(model, **batch) - output(model, **of_task(batch))).abs().max() < 1e-10


def test_the_default_task_is_merged_when_none_is_set():
    model, batch, _ = make("bert", default_task=2)
    expected = output(model, **of_task(batch, 2))
    assert (output(model.merge_and_unload(), **batch) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"has an expert per task: choose the one to merge with `set_task\(task\)`, a task from 0 to 2"),
        ({"variant": "router"}, "'default' has a router: its weights depend on the input and cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_changed(merge, fields, message):
    base = tiny_bert().double()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, **{"variant": "grad"} | fields)
    expected = output(model, **tokens())
    with pytest.raises(ValueError, match=message):
        getattr(model, merge)()
    assert_unchanged(model.base_model.model, weights)
    assert torch.equal(output(model, **tokens()), expected)


def test_of_two_adapters_one_that_cannot_be_merged_stops_both():
    model, batch, weights = make("bert")
    model.add_adapter("routed", MolaConfig(num_experts=2))
    model.base_model.set_adapter(["default", "routed"])
    model.base_model.set_task(TASK, "default")
    with pytest.raises(ValueError, match="'routed' has a router"):
        model.merge_adapter()
    assert_unchanged(model.base_model.model, weights)


def test_two_adapters_are_merged_each_with_its_task():
    model, batch, weights = make("bert")
    model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, r=3, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_task(2, "default")
    model.base_model.set_task(0, "second")
    expected = output(model, **batch)
    model.merge_adapter()
    assert (output(model, **batch) - expected).abs().max() < 1e-10
    model.unmerge_adapter()
    found = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()}
    assert max((found[name] - value).abs().max() for name, value in weights.items()) < 1e-12


def test_a_broken_expert_is_not_merged_safely():
    model, batch, weights = make("bert")
    layer = next(module for module in model.modules() if isinstance(module, MolaLayer))
    with torch.no_grad():
        layer.mola_B["default"][TASK, 0, 0] = torch.nan
    model.set_task(TASK)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_unchanged(model.base_model.model, weights)


def test_merging_and_unmerging_in_bfloat16_comes_back_to_the_weights():
    base = tiny_bert().to(torch.bfloat16)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, variant="grad")
    expected = output(model, **of_task(tokens()))
    model.set_task(TASK)
    model.merge_adapter()
    found = output(model, **tokens())
    assert found.dtype == torch.bfloat16 and (found - expected).abs().mean() < 0.02
    model.unmerge_adapter()
    found = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()}
    for name, value in weights.items():
        assert found[name].dtype == value.dtype
        assert torch.allclose(found[name], value, atol=2e-2), name


@pytest.mark.parametrize("base", [tiny_bert, tiny_gpt2])
def test_merging_and_unmerging_round_as_lora_does_to_the_bit(base):
    targets = ["query", "c_attn", "c_proj"]
    model = adapted(base(), variant="grad", target_modules=targets)
    lora = get_peft_model(base(), LoraConfig(r=2, lora_alpha=16, target_modules=targets)).eval()
    experts = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(experts[name.replace("lora_", "mola_").replace(".weight", "")][TASK])
    model.set_task(TASK)
    for change in ("merge_adapter", "unmerge_adapter"):
        for changed in (model, lora):
            getattr(changed, change)()
        expected = {name: value for name, value in lora.state_dict().items() if "lora_" not in name}
        found = model.state_dict()
        assert any("base_layer" in name for name in expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("number", [3, 5])
def test_many_adapters_are_merged_one_after_the_other(number):
    model, batch, weights = make("bert")
    model.set_task(TASK)
    for i in range(1, number):
        model.add_adapter(f"adapter {i}", MolaConfig(variant="grad", num_experts=2, r=i, init_weights=False))
        model.base_model.set_task(i % 2, f"adapter {i}")
    names = list(model.peft_config)
    model.base_model.set_adapter(names)
    expected = output(model, **batch)
    model.merge_adapter([names[0]])
    with pytest.warns(UserWarning, match="default"):
        model.merge_adapter()  # the others: each is merged once
    assert (output(model, **batch) - expected).abs().max() < 1e-10
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()
    assert (output(model, **batch) - expected).abs().max() < 1e-10
    model.unmerge_adapter()
    assert (output(model, **batch) - expected).abs().max() < 1e-10
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    found = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()}
    assert max((found[name] - value).abs().max() for name, value in weights.items()) < 1e-12


def test_a_merged_adapter_is_saved_as_it_is(tmp_path):
    model, batch, _ = make("bert")
    model.set_task(TASK)
    expected = output(model, **batch)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(tiny_bert().double(), tmp_path / "after").eval()
    loaded.set_task(TASK)
    assert (output(loaded, **batch) - expected).abs().max() < 1e-6  # experts are saved in single precision


@pytest.mark.parametrize("train_base", ["targets", "all"])
def test_a_trained_base_is_not_saved_with_an_expert_in_it(train_base, tmp_path):
    model, batch, _ = make("bert", train_base=train_base)
    model.set_task(TASK)
    expected = output(model, **batch)
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged, and train_base='.*'.*twice.*unmerge_adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert().double(), tmp_path).eval()
    loaded.set_task(TASK)
    assert (output(loaded, **batch) - expected).abs().max() < 1e-6


def test_a_broken_expert_in_a_late_layer_stops_all(tmp_path):
    model, batch, weights = make("bert")
    layer = [module for module in model.modules() if isinstance(module, MolaLayer)][-1]
    with torch.no_grad():
        layer.mola_A["default"][TASK, 0, 0] = torch.inf
    model.set_task(TASK)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        assert_unchanged(model.base_model.model, weights)


SAVED = {
    "a head": (["classifier"], ["query"]),
    "a head that is a target": (["classifier"], ["query", "classifier"]),
    "a layer with targets in it": (["layer.0"], ["query"]),
    "norms": (["LayerNorm"], ["query"]),
}


@pytest.mark.parametrize("train_base", [False, "targets", "all"])
@pytest.mark.parametrize("case", SAVED)
def test_modules_to_save_next_to_a_trained_base(case, train_base, tmp_path):
    """Each weight trains once, and comes back."""
    modules_to_save, targets = SAVED[case]
    fields = {"modules_to_save": modules_to_save, "target_modules": targets, "train_base": train_base}
    model = adapted(tiny_bert_classifier(), variant="grad", default_task=TASK, **fields).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tokens()).logits.square().mean().backward()
        optimizer.step()
    model.eval()
    expected = model(**tokens()).logits
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert_classifier(), tmp_path, is_trainable=True).eval()
    assert torch.equal(again(**tokens()).logits, expected)
    trained = [{name for name, value in m.named_parameters() if value.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]
    model.set_task(TASK)
    torch.testing.assert_close(model.merge_and_unload()(**tokens()).logits, expected)


def test_modules_to_save_that_are_targets_or_parameters_are_refused():
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapted(tiny_bert(), variant="grad", target_modules=["query"], modules_to_save=["query"])
    for train_logit_scale in (False, True):
        with pytest.raises(ValueError, match="modules_to_save names logit_scale.*use train_logit_scale=True"):
            fields = {"modules_to_save": ["logit_scale"], "train_logit_scale": train_logit_scale}
            adapted(tiny_clip()[0], variant="grad", **fields)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Conv2d(1, 2, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_delta_weight_has_the_shape_of_the_weight_and_the_type_of_the_experts(autocast):
    config = MolaConfig(variant="grad", target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(Mixed().bfloat16(), config, autocast_adapter_dtype=autocast)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        delta = layer.get_delta_weight("default", 1)
        assert delta.shape == layer.weight.shape and delta.dtype == layer.mola_A["default"].dtype
        assert delta.dtype == (torch.float32 if autocast else torch.bfloat16) and delta.abs().max() > 0
        with pytest.raises(ValueError, match=r"choose the one to merge with `set_task\(task\)`"):
            layer.get_delta_weight("default")
    model.set_task(1)
    assert torch.equal(delta, layer.get_delta_weight("default"))
