"""Training the base along with the experts: what is trainable, and that all of it is saved and comes back."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_resnet, tokens
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs, tiny_siglip

from hf_dissect.mola import MolaConfig, MolaLayer

TASKS = torch.tensor([2, 0, 1, 0])
RESNET_TARGETS = ["layer.0.convolution"]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_of(model, kind):
    """`experts`: of the adapter; `targets`: the base weights of adapted layers; `base`: all of the base model."""
    prefixes = tuple(f"{name}.base_layer." for name, module in model.named_modules() if isinstance(module, MolaLayer))
    names = {name for name, _ in model.named_parameters()}
    experts = {name for name in names if ".mola_" in name}
    return {
        "experts": experts,
        "targets": {name for name in names if name.startswith(prefixes)},
        "base": names - experts,
    }[kind]


@pytest.mark.parametrize("train_base", [False, True, "targets", "all"])
@pytest.mark.parametrize("fields", [{"variant": "grad"}, {}], ids=["grad", "router"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_bert, ["query"]), (tiny_resnet, RESNET_TARGETS)])
def test_what_trains(make, targets, fields, train_base):
    model = adapted(make(), train_base=train_base, target_modules=targets, **fields)
    kind = {False: None, True: "targets", "targets": "targets", "all": "base"}[train_base]
    expected = names_of(model, "experts") | (names_of(model, kind) if kind else set())
    assert trainable(model) == expected
    assert model.peft_config["default"].train_base == ("targets" if train_base is True else train_base)


def train(model, batch, steps=2):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(**batch, task_ids=TASKS)
        found = outputs["logits_per_image"] if "logits_per_image" in outputs else outputs[0]
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).mean().backward()
        optimizer.step()
    model.eval()


def output(model, batch):
    with torch.no_grad():
        found = model(**batch, task_ids=TASKS)
    return found["logits_per_image"] if "logits_per_image" in found else found[0]


@pytest.mark.parametrize("train_base", [True, "all"])
@pytest.mark.parametrize("fields", [{"variant": "grad"}, {}], ids=["grad", "router"])
@pytest.mark.parametrize(
    ("make", "inputs", "targets"), [(tiny_resnet, pictures, RESNET_TARGETS), (tiny_bert, tokens, ["query"])]
)
def test_the_whole_trained_state_comes_back(make, inputs, targets, fields, train_base, tmp_path):
    model, batch = adapted(make(), train_base=train_base, target_modules=targets, **fields), inputs()
    train(model, batch)
    model.save_pretrained(tmp_path)
    # "all" needs nothing of the base it is loaded on; "targets" needs what was not trained.
    loaded = PeftModel.from_pretrained(make(seed=9 if train_base == "all" else 0), tmp_path).eval()
    assert torch.equal(output(loaded, batch), output(model, batch))
    found, expected = loaded.state_dict(), model.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert trainable(loaded) == set()
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)


def test_batch_norm_statistics_are_saved_with_the_base_and_only_then(tmp_path):
    for train_base, saved in ((False, False), ("targets", True), ("all", True)):
        model = adapted(tiny_resnet(), variant="grad", train_base=train_base)
        model.save_pretrained(tmp_path / str(train_base))
        keys = load_file(tmp_path / str(train_base) / "adapter_model.safetensors")
        assert any("running_mean" in key for key in keys) == saved


def test_training_the_base_moves_it_and_frozen_it_stays():
    for train_base in (False, True, "all"):
        model = adapted(tiny_bert(), variant="grad", train_base=train_base, target_modules=["query"])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, tokens())
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        base, targets = names_of(model, "base"), names_of(model, "targets")
        if train_base is False:
            assert not moved & base
        elif train_base is True:
            assert moved & base == targets
        else:
            assert len(moved & base) > len(targets)


@pytest.mark.parametrize(
    ("new", "parameters"), [(tiny_clip, {"logit_scale"}), (tiny_siglip, {"logit_scale", "logit_bias"})]
)
def test_the_logit_scale_is_trained_and_saved_on_demand(new, parameters, tmp_path):
    base, processor = new()
    batch = tiny_inputs(base, processor, CAPTIONS[:4])
    model = adapted(base, variant="grad", train_logit_scale=True)
    base_names = {name.rpartition(".")[2] for name in trainable(model) - names_of(model, "experts")}
    assert base_names == parameters
    before = base.logit_scale.item()
    train(model, batch)
    assert base.logit_scale.item() != before
    model.save_pretrained(tmp_path)
    fresh, _ = new()
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert fresh.logit_scale.item() == base.logit_scale.item()
    assert torch.equal(output(loaded, batch), output(model, batch)) and trainable(loaded) == set()
    assert not trainable(adapted(new()[0], variant="grad")) - {n for n, _ in model.named_parameters() if "mola_" in n}


def test_a_model_without_a_logit_scale_has_none_to_train():
    with pytest.raises(ValueError, match="train_logit_scale=True: BertModel has no logit_scale"):
        adapted(tiny_bert(), variant="grad", train_logit_scale=True)


@pytest.mark.parametrize(("first", "second"), [({"train_base": True}, {}), ({}, {"train_base": "all"})])
def test_an_adapter_that_changes_the_base_stands_alone(first, second):
    model = adapted(tiny_bert(), variant="grad", **first)
    expected = output(model, tokens())
    with pytest.raises(ValueError, match="changes the base model .train_base or train_logit_scale.*alone"):
        model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, **second))
    assert torch.equal(output(model, tokens()), expected)
    assert list(model.peft_config) == ["default"]


def test_a_saved_adapter_that_changes_the_base_is_not_loaded_beside_another(tmp_path):
    adapted(tiny_bert(), variant="grad", train_base=True).save_pretrained(tmp_path)
    model = adapted(tiny_bert(), variant="grad")
    with pytest.raises(ValueError, match="changes the base model"):
        model.load_adapter(tmp_path, adapter_name="other")
    assert torch.equal(output(model, tokens()), output(adapted(tiny_bert(), variant="grad"), tokens()))


@pytest.mark.parametrize("train_base", [True, "all"])
def test_modules_to_save_go_with_a_trained_base(train_base, tmp_path):
    fields = {"variant": "grad", "train_base": train_base, "target_modules": ["query"], "modules_to_save": ["pooler"]}
    model, batch = adapted(tiny_bert(), **fields), tokens()
    train(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        found, expected = loaded(**batch, task_ids=TASKS), model(**batch, task_ids=TASKS)
    assert torch.equal(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("train_base", [True, "all"])
def test_a_trained_base_merges(train_base):
    model, batch = (
        adapted(tiny_resnet().double(), variant="grad", train_base=train_base),
        pictures(dtype=torch.float64),
    )
    train(model, batch)
    with torch.no_grad():
        expected = model(**batch, task_ids=torch.full((4,), 1)).last_hidden_state
        model.set_task(1)
        assert (model.merge_and_unload()(**batch).last_hidden_state - expected).abs().max() < 1e-10
