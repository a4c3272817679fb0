"""Normalisation per task: the formulas, what trains and what stays, saving, merging, and which layers take part."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from testing.tiny_bases import (
    adapted,
    pictures,
    tiny_bert,
    tiny_convnext,
    tiny_regnet,
    tiny_resnet,
    tiny_vit,
    tokens,
)
from testing.tiny_models import tiny_clip
from torch import nn
from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_dissect.mola import mola_routing
from hf_dissect.mola.norm_layer import MolaNorm
from hf_dissect.mola.task_norms import TaskBatchNorm, TaskNorm, find_kind

TASKS = torch.tensor([2, 0, 2, 0, 2])  # task 1 has no sample


def fresh(kind, *size, seed=0):
    """A batch norm in double precision, with affine and statistics that are not those of a new layer."""
    generator = torch.Generator().manual_seed(seed)
    norm = kind(*size).double()
    for value in (*norm.parameters(), *norm.buffers()):
        if value.is_floating_point():
            value.data = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
    return norm


def own_values(norm, seed=1):
    """Give each expert an affine and statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    for value in (*norm.parameters(), *norm.buffers()):
        if value.is_floating_point():
            value.data = 0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype)
    return norm


def row(norm, base, expert):
    """The batch norm of torch with what one expert has."""
    one = copy.deepcopy(base)
    one.weight.data, one.bias.data = norm.scale[expert].detach().clone(), norm.shift[expert].detach().clone()
    one.running_mean, one.running_var = norm.running_mean[expert].clone(), norm.running_var[expert].clone()
    one.num_batches_tracked = norm.num_batches_tracked[expert].clone()
    return one


INPUTS = {
    "flat": (nn.BatchNorm1d, (5, 4)),
    "sequence": (nn.BatchNorm1d, (5, 4, 3)),
    "image": (nn.BatchNorm2d, (5, 4, 3, 2)),
    "volume": (nn.BatchNorm3d, (5, 4, 2, 3, 2)),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", INPUTS)
def test_each_task_has_the_batch_norm_of_its_samples(case, momentum):
    kind, shape = INPUTS[case]
    base = fresh(kind, 4)
    base.momentum = momentum
    norm = own_values(TaskBatchNorm(base, 3)).train()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3 + 100
    for _ in range(2):
        alone = {task: row(norm, base, task).train() for task in (0, 2)}
        expected = torch.zeros_like(x)
        for task, one in alone.items():
            expected[TASKS == task] = one(x[TASKS == task])
        before = copy.deepcopy(norm)
        output = norm(base, x, TASKS)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
        # As the routing gave them before, and as a router would.
        other = copy.deepcopy(before)
        torch.testing.assert_close(other(base, x, F.one_hot(TASKS, 3).double()), output)
        for task, one in alone.items():
            torch.testing.assert_close(norm.running_mean[task], one.running_mean)
            torch.testing.assert_close(norm.running_var[task], one.running_var)
            assert norm.num_batches_tracked[task] == one.num_batches_tracked
        for name, buffer in before.named_buffers():
            assert torch.equal(dict(norm.named_buffers())[name][1], buffer[1]), "no sample of this task"
    norm.eval()
    output = norm(base, x, TASKS)
    for task in (0, 2):
        torch.testing.assert_close(output[TASKS == task], row(norm, base, task).eval()(x[TASKS == task]))
        torch.testing.assert_close(norm(base, x, task), row(norm, base, task).eval()(x))


def test_gradients_are_those_of_the_batch_norm_of_each_task():
    torch.manual_seed(0)
    base = fresh(nn.BatchNorm2d, 4)
    norm = own_values(TaskBatchNorm(base, 3)).train()
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(x)
    (norm(base, x, TASKS) - target).square().sum().backward()
    found, x.grad = x.grad, None
    ones = {task: row(norm, base, task).train() for task in (0, 2)}
    sum((one(x[TASKS == task]) - target[TASKS == task]).square().sum() for task, one in ones.items()).backward()
    torch.testing.assert_close(found, x.grad)
    for task, one in ones.items():
        torch.testing.assert_close(norm.scale.grad[task], one.weight.grad)
        torch.testing.assert_close(norm.shift.grad[task], one.bias.grad)
    assert not norm.scale.grad[1].any()


def test_one_task_for_the_whole_batch_is_the_batch_norm_of_torch():
    for momentum in (0.1, None):
        base = fresh(nn.BatchNorm2d, 4)
        base.momentum = momentum
        norm = own_values(TaskBatchNorm(base, 3)).train()
        one, x = row(norm, base, 1).train(), torch.randn(5, 4, 3, 2, dtype=torch.float64)
        for _ in range(2):
            assert torch.equal(norm(base, x, 1), one(x))
        assert torch.equal(norm.running_var[1], one.running_var)
        assert norm.num_batches_tracked.tolist() == [0, 2, 0]


@pytest.mark.parametrize("weights", [torch.tensor([0, 1, 1]), 1, torch.tensor([[0.0, 1.0, 0.0]])], ids=str)
def test_a_single_value_per_channel_takes_the_running_statistics(weights):
    base = fresh(nn.BatchNorm1d, 4)
    norm = own_values(TaskBatchNorm(base, 3)).train()
    x = torch.randn(3 if torch.is_tensor(weights) and weights.dim() == 1 else 1, 4, dtype=torch.float64)
    alone = 0 if len(x) == 3 else 1
    before, one = norm.running_mean.clone(), row(norm, base, alone).eval()
    output = norm(base, x, weights)
    torch.testing.assert_close(output[:1], one(x[:1]))
    assert torch.equal(norm.running_mean[alone], before[alone]) and norm.num_batches_tracked[alone] == 0
    output.sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in norm.parameters())


def test_soft_weights_give_each_expert_the_moments_of_the_weighted_batch():
    base = fresh(nn.BatchNorm2d, 4)
    norm = own_values(TaskBatchNorm(base, 3)).train()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64, generator=generator) + 10
    weights = torch.randn(5, 3, dtype=torch.float64, generator=generator).softmax(-1).requires_grad_()
    before = copy.deepcopy(norm)
    output = norm(base, x, weights)
    expected = 0
    for expert in range(3):
        share = (weights[:, expert] / weights[:, expert].sum())[:, None, None, None]
        mean = (share * x).sum(0).mean((1, 2))
        var = (share * (x - mean[:, None, None]).square()).sum(0).mean((1, 2))
        normal = (x - mean[:, None, None]) / (var[:, None, None] + base.eps).sqrt()
        own = normal * norm.scale[expert][:, None, None] + norm.shift[expert][:, None, None]
        expected = expected + weights[:, expert][:, None, None, None] * own
        torch.testing.assert_close(norm.running_mean[expert], 0.9 * before.running_mean[expert] + 0.1 * mean)
        count = 6 * weights[:, expert].sum() ** 2 / weights[:, expert].square().sum()
        moved = 0.9 * before.running_var[expert] + 0.1 * var * count / (count - 1)
        torch.testing.assert_close(norm.running_var[expert], moved.detach())
    torch.testing.assert_close(output, expected)
    target = torch.randn_like(x)
    assert torch.allclose(*(torch.autograd.grad((y * target).sum(), weights)[0] for y in (output, expected)))
    norm.eval()
    mean = sum(row(norm, base, expert).eval()(x) for expert in range(3)) / 3
    torch.testing.assert_close(norm(base, x, torch.full((1, 3), 1 / 3, dtype=torch.float64)), mean)


def test_batch_norm_without_affine_or_without_statistics():
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    base = nn.BatchNorm1d(4, affine=False).double()
    norm = TaskBatchNorm(base, 3).train()
    expected = torch.cat([F.batch_norm(x[TASKS == task], None, None, training=True) for task in (0, 2)])
    torch.testing.assert_close(norm(base, x, TASKS)[TASKS.argsort(stable=True)], expected)
    assert (norm.running_mean[0] != 0).all() and not norm.running_mean[1].any()
    base = fresh(nn.BatchNorm1d, 4)
    base.running_mean = base.running_var = base.num_batches_tracked = None
    base.track_running_stats = False
    norm = TaskBatchNorm(base, 3)
    for mode in (True, False):
        output = norm.train(mode)(base, x, TASKS)
        torch.testing.assert_close(output[TASKS == 2], base.train(mode)(x[TASKS == 2]))
        torch.testing.assert_close(norm(base, x[:1, :, :1], 0), base.bias.detach()[None, :, None].expand(1, -1, -1))


NORMS = {
    "layer": (nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "layer without bias": (nn.LayerNorm(4, bias=False), (5, 4)),
    "group": (nn.GroupNorm(2, 4), (5, 4, 3, 2)),
    "rms": (nn.RMSNorm(4), (5, 3, 4)),
    "llama": (LlamaRMSNorm(4), (5, 3, 4)),
}


@pytest.mark.parametrize("case", NORMS)
def test_affine_by_task_for_layers_without_statistics(case):
    base, shape = NORMS[case]
    norm = own_values(TaskNorm(base, 3))
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(shape, generator=generator), torch.rand(5, 3, generator=generator).softmax(-1)
    alone = []
    for expert in range(3):
        one = copy.deepcopy(base)
        one.weight.data = norm.scale[expert].detach()
        if norm.shift is not None:
            one.bias.data = norm.shift[expert].detach()
        alone.append(one(x))
        torch.testing.assert_close(norm(base, x, expert), alone[-1])
    expected = torch.stack([alone[task][place] for place, task in enumerate(TASKS.tolist())])
    torch.testing.assert_close(norm(base, x, TASKS), expected)
    mixed = torch.einsum("be,eb...->b...", weights, torch.stack(alone))
    torch.testing.assert_close(norm(base, x, weights), mixed)
    if case == "rms":
        torch.testing.assert_close(norm(base, x.transpose(0, 1), TASKS, batch_dim=1), expected.transpose(0, 1))
    half = norm(base.bfloat16(), x.bfloat16(), TASKS)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.2)
    base.float()


def test_only_layers_whose_formula_is_known_are_adapted():
    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    for module in (Scaled(4), Activated(4), GatedRMSNorm(4), HalfRMSNorm(4), nn.InstanceNorm2d(4, affine=True)):
        assert find_kind(module) is None


# ---- in a model ----


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=50, max_position_embeddings=16, pad_token_id=0, **sizes)).eval()


def tiny_gemma():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=50, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    return Gemma2Model(config).eval()


PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
BASES = {
    "bert": (tiny_bert, tokens, {}),
    "vit": (tiny_vit, pictures, {}),
    "llama": (tiny_llama, tokens, PROJECTIONS),
    "gemma": (tiny_gemma, tokens, PROJECTIONS),
    "resnet": (tiny_resnet, pictures, {}),
    "regnet": (tiny_regnet, pictures, {"target_modules": ["convolution"]}),
    "convnext": (tiny_convnext, pictures, {"target_modules": ["pwconv1", "pwconv2"]}),
}
MIXED = {"task_ids": torch.tensor([0, 1, 2, 0])}


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MolaNorm)}


def make(case, **fields):
    new_base, inputs, targets = BASES[case]
    model = adapted(new_base(), task_norms=True, **{"variant": "grad"} | targets | fields)
    for place, layer in enumerate(layers(model).values()):
        for norm in layer.mola_norm.values():
            own_values(norm, seed=place)
    return model, inputs()


def output(model, **batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("fields", [{"variant": "grad"}, {"variant": "router", "router_input": "embeddings"}], ids=str)
@pytest.mark.parametrize("case", BASES)
def test_at_first_it_is_the_adapter_without_task_norms(case, fields):
    new_base, inputs, targets = BASES[case]
    models = [adapted(new_base(), task_norms=task_norms, **targets | fields) for task_norms in (False, True)]
    batch = inputs() | (MIXED if fields["variant"] == "grad" else {})
    norms = [name for name, module in new_base().named_modules() if find_kind(module)]
    assert len(layers(models[1])) == len(norms) > 1
    plain, norms = (output(model, **batch) for model in models)
    torch.testing.assert_close(norms, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", BASES)
def test_mixed_tasks_are_the_tasks_one_by_one(case):
    model, batch = make(case)
    mixed = output(model, **batch, **MIXED)
    for place, task in enumerate(MIXED["task_ids"].tolist()):
        alone = output(model, **batch, task_ids=torch.full((4,), task))
        torch.testing.assert_close(mixed[place], alone[place], rtol=1e-4, atol=1e-5)
    assert (mixed[0] - output(model, **batch, task_ids=torch.ones(4, dtype=torch.int64))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["resnet", "bert", "gemma"])
def test_merged_is_the_task_and_unmerged_is_as_before_bit_for_bit(case):
    model, batch = make(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = output(model, **batch, task_ids=torch.full((4,), 1))
    model.set_task(1)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model, **batch), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    after = model.state_dict()
    for name in (name for name in before if "norm" in name.lower()):
        assert torch.equal(after[name], before[name]), name
    plain = copy.deepcopy(model).merge_and_unload()
    assert not layers(plain) and not any("mola" in name for name in plain.state_dict())
    torch.testing.assert_close(output(plain, **batch), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(model.unload(), **batch), output(BASES[case][0](), **batch))


def test_a_broken_norm_is_not_merged():
    model, batch = make("resnet")
    list(layers(model).values())[-1].mola_norm["default"].running_var[1] = torch.nan
    model.set_task(1)
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.set_task(0)
    model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="task_ids were given while the expert of task"):
        model(**batch, **MIXED)


def test_several_adapters_are_not_merged_into_one_norm():
    model, _ = make("resnet")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for name in ("default", "other"):
        model.base_model.set_task(1, name)
    with pytest.raises(ValueError, match="'default', 'other' have task_norms.*merge one at a time"):
        model.merge_adapter(adapter_names=["default", "other"])
    assert not any(layer.merged for layer in layers(model).values())
    with pytest.raises(TypeError, match="'default' was trained with task_norms, which a LoRA adapter"):
        convert_to_lora(model, rank=2)


@pytest.mark.parametrize("fields", [{}, {"variant": "router"}, {"train_base": "all"}], ids=str)
def test_it_is_saved_and_loaded_bit_for_bit(tmp_path, fields):
    model, batch = make("resnet", **fields)
    tasks = MIXED if fields.get("variant") != "router" else {}
    model.train()
    model(**batch, **tasks)
    model.eval()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_resnet(seed=0), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        found, expected = loaded.state_dict(), model.state_dict()
        assert any("mola_norm.default.running_var" in name for name in found)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
        assert torch.equal(output(loaded, **batch, **tasks), output(model, **batch, **tasks))
        assert not any(value.requires_grad for value in loaded.parameters())
        loaded.train()(**batch, **tasks)
        for name, value in loaded.named_buffers():
            if "mola_router" not in name:
                assert torch.equal(value, expected[name]), "an adapter that does not train does not move"


def test_statistics_of_the_tasks_move_and_those_of_the_frozen_base_do_not():
    model, batch = make("resnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(**batch, task_ids=torch.tensor([0, 2, 2, 0])).last_hidden_state.sum().backward()
    for name, buffer in model.named_buffers():
        same = [torch.equal(*pair) for pair in zip(buffer.flatten(), before[name].flatten(), strict=True)]
        if "base_layer" in name:
            assert all(same)
        else:
            assert torch.equal(buffer[1], before[name][1])
            assert not torch.equal(buffer[0], before[name][0]) and not torch.equal(buffer[2], before[name][2])
    moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with model.disable_adapter():
        model(**batch)
    model.requires_grad_(False)
    model(**batch, **MIXED)
    assert all(torch.equal(buffer, moved[name]) for name, buffer in model.named_buffers())


def test_a_training_step_moves_the_affine_of_its_tasks_and_lowers_the_loss():
    model, batch = make("resnet", train_base="all")
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(**batch, **MIXED).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is not None for value in trained), "none is left over, which DDP would refuse"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_disabled_several_and_deleted_adapters():
    batch, plain = pictures(), output(tiny_resnet(), **pictures())
    model, _ = make("resnet")
    first = output(model, **batch, **MIXED)
    with model.disable_adapter():
        assert torch.equal(output(model, **batch), plain)
    config = copy.deepcopy(model.peft_config["default"])
    config.num_experts, config.exclude_modules = 2, {"embedder.normalization"}
    model.add_adapter("other", config)
    assert torch.equal(output(model, **batch, **MIXED), first)
    assert not any(value.requires_grad for name, value in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    second = output(model, **batch, task_ids=torch.tensor([0, 1, 1, 0]))
    assert (second - first).abs().max() > 1e-3
    names = [name for name, value in model.named_parameters() if value.requires_grad and "mola_norm" in name]
    assert names and all(".other." in name for name in names)
    with pytest.raises(ValueError, match="'default', 'other' have task_norms"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(output(model, **batch, **MIXED), first)
    assert not any(".other." in name for name in model.state_dict())


def test_without_tasks_the_mean_of_the_experts_or_the_fixed_task_normalises():
    model, batch = make("bert")
    assert torch.isfinite(output(model, **batch)).all()
    model.set_task(2)
    assert torch.equal(output(model, **batch), output(model, **batch, task_ids=torch.full((4,), 2)))


def test_the_router_learns_through_the_norms():
    model, batch = make("resnet", variant="router", init_weights=True)
    model.train()(**batch).last_hidden_state.square().sum().backward()  # B is zero, so only through the norms
    router = mola_routing(model).mola_router["default"]
    assert router.branches["model"].scores.weight.grad.abs().max() > 0


def test_which_layers_take_part(recwarn):
    model = adapted(tiny_bert(), variant="grad", task_norms=True, exclude_modules=["attention.output.LayerNorm"])
    assert {name.removeprefix("base_model.model.") for name in layers(model)} == {
        "embeddings.LayerNorm",
        "encoder.layer.0.output.LayerNorm",
        "encoder.layer.1.output.LayerNorm",
    }
    fields = {"target_modules": ["query"], "layers_to_transform": [1]}
    model = adapted(tiny_bert(), variant="grad", task_norms=True, **fields)
    assert len(layers(model)) == 2 and all(".layer.1." in name for name in layers(model))
    model = adapted(tiny_clip()[0], variant="grad", task_norms=True, target_modules=r"vision_model.*q_proj")
    assert layers(model) and all("vision_model" in name for name in layers(model))
    model = adapted(tiny_resnet(), variant="grad", task_norms=True, modules_to_save=["embedder.normalization"])
    assert layers(model) and not any("embedder.embedder.normalization" in name for name in layers(model))
    assert not [warning for warning in recwarn if "task_norms" in str(warning.message)]


def test_what_cannot_be_done_is_said():
    class FixedNorm(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    base = tiny_bert()
    base.encoder.layer[1].output.LayerNorm = FixedNorm(16)
    with pytest.warns(UserWarning, match=r"encoder.layer.1.output.LayerNorm \(FixedNorm\)"):
        model = adapted(base, variant="grad", task_norms=True)
    assert len(layers(model)) == 4
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential has no normalisation layer"):
        adapted(plain, variant="grad", task_norms=True, target_modules=["0"])
    assert type(plain[0]) is nn.Linear, "refused before work starts"
    with pytest.raises(ValueError, match="task_norms='yes': must be True or False"):
        adapted(tiny_bert(), task_norms="yes")
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()  # its fast path reads the weights
    encoder = nn.ModuleDict({"inner": layer, "norm": nn.LayerNorm(16)})
    with pytest.warns(UserWarning, match="nothing calls them"):
        model = adapted(encoder, variant="grad", task_norms=True, target_modules=["linear1"])
    assert [name.rpartition(".")[2] for name in layers(model)] == ["norm"]


def test_half_precision_and_copies():
    model, batch = make("resnet")
    expected = output(model, **batch, **MIXED)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, **batch, **MIXED), expected)
    assert list(layers(copied).values())[0].routing is mola_routing(copied)
    half = {"pixel_values": batch["pixel_values"].bfloat16()}
    for mode in (False, True):
        for tasks in (MIXED, {"task_ids": torch.ones(4, dtype=torch.int64)}):
            found = output(copied.bfloat16().train(mode), **half, **tasks)
            assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    model = adapted(tiny_resnet().bfloat16(), variant="grad", task_norms=True)  # PEFT keeps adapters in float32
    for mode in (False, True):
        for tasks in (MIXED, {"task_ids": torch.ones(4, dtype=torch.int64)}):
            assert output(model.train(mode), **half, **tasks).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        assert torch.isfinite(output(make("vit")[0], **batch, **MIXED)).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, batch = make("bert")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()(**batch, **MIXED).last_hidden_state.square().sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if "mola_norm" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_adapter_is_loaded_natively_and_by_the_names_of_its_weights(tmp_path):
    model, batch = make("resnet")
    model.save_pretrained(tmp_path)
    native = tiny_resnet()
    native.load_adapter(str(tmp_path))
    assert torch.equal(output(native, **batch, **MIXED), output(model, **batch, **MIXED))
    state = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    base = inject_adapter_in_model(model.peft_config["default"], tiny_resnet(), state_dict=state)
    set_peft_model_state_dict(base, state)
    assert torch.equal(output(base.eval(), **batch, **MIXED), output(model, **batch, **MIXED))


def test_a_compiled_model_is_the_same():
    model, batch = make("resnet")
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for mode in (True, False):
        found, expected = (each.train(mode)(**batch, **MIXED).last_hidden_state for each in (compiled, model))
        torch.testing.assert_close(found, expected)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(compiled._orig_mod.state_dict()[name], buffer)


def test_autocast_keeps_statistics_in_full_precision():
    base = fresh(nn.BatchNorm2d, 4).float()
    norm = own_values(TaskBatchNorm(base, 3)).train()
    x = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(0)) + 30
    other = copy.deepcopy(norm)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(base, x, TASKS), other(base, x, TASKS))
    for name, buffer in copy.deepcopy(norm).named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])


def test_clip_normalises_each_tower_by_its_weights():
    clip, processor = tiny_clip()
    batch = {
        "input_ids": torch.randint(3, 30, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "pixel_values": torch.randn(4, 3, clip.config.vision_config.image_size, clip.config.vision_config.image_size),
    }
    for fields in ({"variant": "grad"}, {"variant": "router"}):
        model = adapted(copy.deepcopy(clip), task_norms=True, **fields)
        for place, layer in enumerate(layers(model).values()):
            own_values(layer.mola_norm["default"], seed=place)
        tasks = MIXED if fields["variant"] == "grad" else {}
        with torch.no_grad():
            whole = model(**batch, **tasks)
            image = model.get_image_features(batch["pixel_values"], **tasks)
        image = image if torch.is_tensor(image) else image.pooler_output
        torch.testing.assert_close(F.normalize(image, dim=-1), whole.image_embeds)


def test_inputs_with_the_sequence_first_are_normalised_by_their_samples():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x, task_ids=None):
            return self.norm(self.attention(x.transpose(0, 1))).transpose(0, 1)

    torch.manual_seed(0)
    x, tasks = torch.randn(3, 5, 4), torch.tensor([2, 0, 1])
    fields = {"variant": "grad", "task_norms": True, "target_modules": ["attention"]}
    model = adapted(Encoder(), sequence_first=["attention", "norm"], **fields)
    own_values(list(layers(model).values())[0].mola_norm["default"])
    with torch.no_grad():
        mixed = model(x, task_ids=tasks)
        for place, task in enumerate(tasks.tolist()):
            torch.testing.assert_close(mixed[[place]], model(x[[place]], task_ids=torch.tensor([task])))
    # Six rows and three samples: the norm refuses what the dense layer, here known, does not.
    model = adapted(Encoder(), **fields)
    for layer in model.modules():
        if type(layer).__name__ == "Linear" and hasattr(layer, "knows_batch_dim"):
            layer.knows_batch_dim = True
    with pytest.raises(ValueError, match="Name the modules that compute on"):
        model(torch.randn(3, 6, 4), task_ids=tasks)
