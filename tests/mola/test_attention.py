"""MoLA in torch's attention, against torch's own with the weights of each sample, and where torch would pass it by."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import SiglipVisionConfig, SiglipVisionModel

from hf_dissect.mola import MolaConfig, MolaLayer, MultiheadAttention
from hf_dissect.mola.attention import leave_fused_paths, restore_fused_paths

EMBED, HEADS, EXPERTS, SCALE = 8, 2, 3, 8.0
TASKS = torch.tensor([2, 0, 1])
QUERIES, KEYS = 4, 5


class Net(nn.Module):
    """A model with one attention, whose own inputs have the batch first."""

    def __init__(self, batch_first: bool = True, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **options)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        value = key if value is None else value
        if self.attn.batch_first:
            return self.attn(query, key, value, **options)
        inputs = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        output, weights = self.attn(*(inputs[id(x)] for x in (query, key, value)), **options)
        return output.transpose(0, 1), weights


def adapt(net: nn.Module, **fields) -> PeftModel:
    torch.manual_seed(1)
    fields = {"num_experts": EXPERTS, "r": 2, "init_weights": False, "target_modules": ["attn"]} | fields
    return get_peft_model(net, MolaConfig(variant="grad", **fields))


def make(batch_first: bool = True, seed: int = 0, **options) -> tuple[PeftModel, MultiheadAttention]:
    torch.manual_seed(seed)
    net = Net(batch_first, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():  # biases start at zero
            parameter.copy_(torch.randn_like(parameter) / 2)
    model = adapt(net).eval()
    return model, model.base_model.model.attn


def inputs_for(number: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(number)
    sizes = [QUERIES, KEYS, KEYS][:number]
    return tuple(torch.randn(len(TASKS), size, EMBED, dtype=torch.float64) for size in sizes)


def one_by_one(layer: MultiheadAttention, inputs, **options):
    """Call torch's attention for each sample, with the weights of its task."""
    out_proj = layer.base_layer.out_proj
    plain = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, bias=layer.in_proj_bias is not None).double().eval()
    outputs, all_weights = [], []
    for i, task in enumerate(TASKS.tolist()):
        A, B = (part["default"][task] for part in (layer.mola_A, layer.mola_B))
        A_out, B_out = (part["default"][task] for part in (out_proj.mola_A, out_proj.mola_B))
        weights = {
            "in_proj_weight": layer.in_proj_weight + SCALE * B @ A,
            "out_proj.weight": out_proj.weight + SCALE * B_out @ A_out,
        }
        if layer.in_proj_bias is not None:
            weights |= {"in_proj_bias": layer.in_proj_bias, "out_proj.bias": out_proj.bias}
        one = dict(options)
        if options.get("key_padding_mask") is not None:
            one["key_padding_mask"] = options["key_padding_mask"][i : i + 1]
        if options.get("attn_mask") is not None and options["attn_mask"].dim() == 3:
            one["attn_mask"] = options["attn_mask"][i * HEADS : (i + 1) * HEADS]
        sample = [x[i : i + 1] for x in inputs]
        sample += sample[-1:] * (3 - len(sample))
        output, attention = functional_call(plain, weights, tuple(sample), one)
        outputs.append(output)
        all_weights.append(attention)
    return torch.cat(outputs), None if all_weights[0] is None else torch.cat(all_weights)


def masks(number: int) -> dict[str, dict[str, torch.Tensor]]:
    size = QUERIES if number == 1 else KEYS
    padding = torch.arange(size)[None] >= torch.tensor([[size], [size - 1], [2]])
    causal = torch.ones(QUERIES, size).triu(2).bool()
    each = torch.rand(len(TASKS) * HEADS, QUERIES, size, generator=torch.Generator().manual_seed(0)) > 0.7
    each[:, :, 0] = False
    floats = {"attn_mask": -3.0 * causal.double(), "key_padding_mask": -2.0 * padding.double()}
    return {
        "no mask": {},
        "key_padding_mask": {"key_padding_mask": padding},
        "attn_mask": {"attn_mask": causal},
        "attn_mask of each head": {"attn_mask": each},
        "both": {"attn_mask": each, "key_padding_mask": padding},
        "numbers": floats,
        "numbers of each head": floats | {"attn_mask": torch.randn(each.shape).double()},
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3], ids=["self", "cross", "three inputs"])
@pytest.mark.parametrize("mask", masks(1))
def test_mixed_tasks_equal_torch_with_the_weights_of_each_sample(mask, number, batch_first):
    model, layer = make(batch_first)
    inputs, mask = inputs_for(number), masks(number)[mask]
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        found, weights = model(*inputs, task_ids=TASKS, **options, **mask)
        expected, expected_weights = one_by_one(layer, inputs, **options, **mask)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-12
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            assert weights.shape == expected_weights.shape and (weights - expected_weights).abs().max() < 1e-12


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_equal_those_of_torch(number, need_weights, batch_first):
    model, layer = make(batch_first)
    inputs = tuple(x.requires_grad_() for x in inputs_for(number))
    leaves = [*inputs, *(p for name, p in layer.named_parameters() if "mola_" in name)]
    found = model(*inputs, task_ids=TASKS, need_weights=need_weights)[0]
    expected = one_by_one(layer, inputs)[0]
    upstream = torch.randn_like(found)
    assert len(leaves) == number + 4
    for own, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert other.abs().max() > 1e-3 and (own - other).abs().max() < 1e-12 * max(1, other.abs().max())


def test_attention_without_bias():
    model, layer = make(bias=False)
    inputs = inputs_for(1)
    assert (model(*inputs, task_ids=TASKS)[0] - one_by_one(layer, inputs)[0]).abs().max() < 1e-12


def test_the_causal_hint():
    model, layer = make()
    inputs, mask = inputs_for(1), nn.Transformer.generate_square_subsequent_mask(QUERIES).double()
    expected = one_by_one(layer, inputs, attn_mask=mask)[0]
    padding = torch.zeros(len(TASKS), QUERIES).bool()
    for options in ({"need_weights": False}, {"need_weights": True}, {"key_padding_mask": padding.double()}):
        found = model(*inputs, task_ids=TASKS, attn_mask=mask, is_causal=True, **options)[0]
        assert (found - expected).abs().max() < 1e-12
    with pytest.raises(RuntimeError, match="is_causal=True needs the causal attn_mask"):
        model(*inputs, task_ids=TASKS, is_causal=True)


def test_masks_of_a_wrong_shape_or_type_are_refused():
    model, _ = make()
    inputs = inputs_for(2)
    with pytest.raises(RuntimeError, match=r"attn_mask has the shape \(5, 4\); it must be \(4, 5\) or \(6, 4, 5\)"):
        model(*inputs, task_ids=TASKS, attn_mask=torch.zeros(KEYS, QUERIES))
    with pytest.raises(RuntimeError, match=r"key_padding_mask has the shape \(3, 4\); it must be \(3, 5\)"):
        model(*inputs, task_ids=TASKS, key_padding_mask=torch.zeros(3, QUERIES).bool())
    with pytest.raises(TypeError, match="mask of type torch.int64"):
        model(*inputs, task_ids=TASKS, attn_mask=torch.zeros(QUERIES, KEYS).long())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_of_the_attention_is_that_of_torch(batch_first, need_weights):
    torch.manual_seed(0)
    net = Net(batch_first, dropout=0.5).double()
    plain = copy.deepcopy(net).train()
    model = adapt(net, init_weights=True).train()  # B is zero
    inputs = inputs_for(2)
    outputs = []
    for options, attention in (({}, plain), ({"task_ids": TASKS}, model)):
        torch.manual_seed(5)
        outputs.append(attention(*inputs, need_weights=need_weights, **options)[0])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-12
    assert (outputs[0] - plain.eval()(*inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_an_adapter_the_output_is_exactly_that_of_torch(batch_first):
    torch.manual_seed(0)
    net = Net(batch_first).double()
    plain = copy.deepcopy(net).requires_grad_(False).eval()
    model = adapt(net).eval()
    inputs = inputs_for(2)
    with model.disable_adapter():
        for own, other in zip(model(*inputs), plain(*inputs), strict=True):
            assert torch.equal(own, other)
    assert not torch.equal(model(*inputs, task_ids=TASKS)[0], plain(*inputs)[0])
    assert torch.equal(model.unload()(*inputs)[0], plain(*inputs)[0])


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_both_weights_are_merged_and_unmerged(batch_first, safe_merge):
    model, layer = make(batch_first)
    inputs, out_proj = inputs_for(1), layer.base_layer.out_proj
    before = [weight.clone() for weight in (layer.in_proj_weight, out_proj.weight)]
    expected = model(*inputs, task_ids=torch.ones(3, dtype=torch.int64))[0]
    model.base_model.set_task(1)
    assert (model(*inputs)[0] - expected).abs().max() < 1e-12
    model.merge_adapter(safe_merge=safe_merge)
    for part, weight, old in zip((layer, out_proj), (layer.in_proj_weight, out_proj.weight), before, strict=True):
        delta = SCALE * part.mola_B["default"][1] @ part.mola_A["default"][1]
        assert (weight - old - delta).abs().max() < 1e-12 < delta.abs().max()
        assert (part.get_delta_weight("default", 1) - delta).abs().max() < 1e-12
    assert (model(*inputs)[0] - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="is merged"):
        model(*inputs, task_ids=TASKS)
    model.unmerge_adapter()
    assert (layer.in_proj_weight - before[0]).abs().max() < 1e-12
    assert (out_proj.weight - before[1]).abs().max() < 1e-12
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged.attn) is nn.MultiheadAttention and type(merged.attn.out_proj).__module__.startswith("torch.")
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in Net(batch_first).named_parameters()]
    assert (merged(*inputs)[0] - expected).abs().max() < 1e-12


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model, _ = make()
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    names = [name for name, _ in model.named_parameters() if "mola_" in name]
    assert names == [
        f"base_model.model.attn.{part}mola_{letter}.default"
        for part in ("base_layer.out_proj.", "")
        for letter in "AB"
    ]
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = inputs_for(2)
    assert torch.equal(loaded(*inputs, task_ids=TASKS)[0], model(*inputs, task_ids=TASKS)[0])


def test_adapters_are_added_switched_and_deleted():
    model, layer = make()
    inputs = inputs_for(2)
    first = model(*inputs, task_ids=TASKS)[0]
    config = MolaConfig(variant="grad", num_experts=4, r=1, init_weights=False, target_modules=["attn"])
    model.add_adapter("second", config)
    assert torch.equal(model(*inputs, task_ids=TASKS)[0], first)
    model.set_adapter("second")
    assert (model(*inputs, task_ids=TASKS)[0] - first).abs().max() > 1e-3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all(name.endswith(".second") for name in trained)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(*inputs, task_ids=TASKS)[0], first)
    assert not any("second" in name for name in layer.state_dict())


def test_an_active_adapter_of_other_layers_leaves_the_attention_to_torch():
    net = Net()
    net.other = nn.Linear(EMBED, EMBED)
    plain = copy.deepcopy(net).requires_grad_(False).eval()
    model = adapt(net).eval()
    model.add_adapter("other", MolaConfig(variant="grad", num_experts=2, target_modules=["other"]))
    model.set_adapter("other")
    x = torch.randn(3, QUERIES, EMBED)
    assert torch.equal(model(x, task_ids=TASKS % 2)[0], plain(x)[0])


@pytest.mark.parametrize("targets", [["attn", "out_proj"], ["out_proj", "attn"], r".*(attn|out_proj)"])
def test_the_output_projection_may_be_named_as_well(targets):
    model = adapt(Net(), target_modules=targets)
    assert len([name for name, _ in model.named_parameters() if "mola_" in name]) == 4


def test_the_output_projection_alone_is_left_out_with_the_way_out():
    net = Net()
    net.other = nn.Linear(EMBED, EMBED)
    with pytest.warns(UserWarning, match=r"attn.out_proj is left out: .* Name the attention itself .* \(attn\)"):
        adapt(net, target_modules=["out_proj", "other"])


class Own(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return query, None


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        (nn.MultiheadAttention(8, 2, kdim=4), ValueError, "kdim=4 or vdim=8 other than embed_dim=8"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), ValueError, "add_bias_kv=True"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), ValueError, "add_zero_attn=True"),
        (Own(8, 2), TypeError, "Own has a forward method of its own"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(attention, error, message):
    net = Net()
    net.attn = attention
    with pytest.raises(error, match=message):
        adapt(net)
    assert net.attn is attention and type(attention.out_proj).__module__.startswith("torch.")


def test_an_attention_that_another_method_has_adapted_is_refused():
    lora = get_peft_model(Net(), LoraConfig(r=2, target_modules=["attn"])).base_model.model
    with pytest.raises(TypeError, match="another PEFT method has adapted this attention"):
        adapt(lora)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_single_sample_without_a_batch(batch_first):
    model, layer = make(batch_first)
    model.base_model.set_task(1)
    query, key = torch.randn(QUERIES, EMBED).double(), torch.randn(KEYS, EMBED).double()
    mask = {"key_padding_mask": torch.arange(KEYS) == 4, "attn_mask": torch.rand(HEADS, QUERIES, KEYS) > 0.9}
    found, weights = layer(query, key, key, **mask)
    expected, expected_weights = model(
        query[None],
        key[None],
        task_ids=torch.tensor([1]),
        key_padding_mask=mask["key_padding_mask"][None],
        attn_mask=mask["attn_mask"],
    )
    assert found.shape == (QUERIES, EMBED) and (found - expected[0]).abs().max() < 1e-12
    assert weights.shape == (QUERIES, KEYS) and (weights - expected_weights[0]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_under_autocast(dtype):
    torch.manual_seed(0)
    model = adapt(Net()).train()
    layer, x = model.base_model.model.attn, torch.randn(3, QUERIES, EMBED)
    with torch.autocast("cpu", dtype):
        found = model(x, task_ids=TASKS, attn_mask=torch.zeros(QUERIES, QUERIES).bool())[0]
    found.float().sum().backward()
    assert layer.mola_A["default"].grad.isfinite().all()
    expected = model(x, task_ids=TASKS)[0]
    assert found.dtype == dtype and (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_attention_compiles_to_one_graph():
    torch._dynamo.reset()
    model, _ = make()
    inputs = inputs_for(2)
    found = torch.compile(model, fullgraph=True, backend="eager")(*inputs, task_ids=TASKS, **masks(2)["both"])[0]
    assert (found - model(*inputs, task_ids=TASKS, **masks(2)["both"])[0]).abs().max() < 1e-12


# ---- attention inside of other modules ----


class Block(nn.Module):
    """A residual block in the form of open_clip's: sequence first, with names of its own."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(EMBED)
        self.attn = nn.MultiheadAttention(EMBED, HEADS)
        self.mlp = nn.Sequential(nn.Linear(EMBED, 16), nn.GELU(), nn.Linear(16, EMBED))

    def forward(self, x, attn_mask=None):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, attn_mask=mask)
        return x.transpose(0, 1)


def test_a_tower_of_open_clips_form_takes_the_expert_of_each_sample():
    torch.manual_seed(0)
    model = adapt(Tower().double()).eval()
    x = torch.randn(3, QUERIES, EMBED, dtype=torch.float64)
    found = model(x, task_ids=TASKS)
    for i, task in enumerate(TASKS.tolist()):
        alone = copy.deepcopy(model)
        alone.base_model.set_task(task)
        assert (alone.merge_and_unload()(x[i : i + 1])[0] - found[i]).abs().max() < 1e-12
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "mola_" in name)


def test_the_pooling_head_of_siglip_is_adapted_by_name():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(**size, image_size=16, patch_size=8)).double().eval()
    model = adapt(base, target_modules=["head.attention"]).eval()
    assert isinstance(model.base_model.model.get_submodule("head.attention"), MultiheadAttention)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found = model(pixel_values=pixels, task_ids=TASKS).pooler_output
    for i, task in enumerate(TASKS.tolist()):
        alone = copy.deepcopy(model)
        alone.base_model.set_task(task)
        expected = alone.merge_and_unload()(pixel_values=pixels[i : i + 1]).pooler_output
        assert (expected[0] - found[i]).abs().max() < 1e-12


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear1", "linear2"]])
def test_an_encoder_that_has_the_sequence_first_takes_the_expert_of_each_sample(targets, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, 0.0, norm_first=norm_first)
    model = adapt(Transposed(layer).double(), target_modules=targets)
    x = torch.randn(3, 3, EMBED, dtype=torch.float64)  # as many tokens as samples
    found = model(x, task_ids=TASKS)
    for i, task in enumerate(TASKS.tolist()):
        alone = model(x[i : i + 1], task_ids=TASKS[i : i + 1])
        assert (alone[0] - found[i]).abs().max() < 1e-12, task


class Transposed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, 0.0, batch_first=True, norm_first=norm_first, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["self_attn"], ["self_attn", "linear1", "linear2"]])
def test_torchs_encoder_calls_adapted_layers_in_evaluation(targets, norm_first, padded):
    torch.manual_seed(0)
    net = Encoder(norm_first)
    plain = copy.deepcopy(net).requires_grad_(False).eval()
    model = adapt(net, target_modules=targets)
    leave_fused_paths(model)
    x = torch.randn(3, QUERIES, EMBED)
    padding = torch.arange(QUERIES)[None] >= torch.tensor([[4], [3], [2]]) if padded else None
    expected = model.train()(x, padding, task_ids=TASKS).detach()
    model.eval()
    with torch.no_grad():
        found = model(x, padding, task_ids=TASKS)
        keep = slice(None) if padding is None else ~padding
        assert (found - expected)[keep].abs().max() < 1e-5
        assert (found - plain(x, padding))[keep].abs().max() > 1e-2
        with model.disable_adapter():
            assert (model(x, padding) - plain(x, padding))[keep].abs().max() < 1e-5
    unloaded = model.unload()
    restore_fused_paths(unloaded)
    for own, other in zip(unloaded.modules(), plain.modules(), strict=True):
        for attribute in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(own, attribute, None) == getattr(other, attribute, None)
        assert "_mola_fused" not in vars(own)


def test_an_encoder_without_adapted_layers_keeps_its_fused_path():
    net = nn.ModuleDict({"encoder": Encoder().encoder, "attn": nn.MultiheadAttention(EMBED, HEADS)})
    model = adapt(net)
    leave_fused_paths(model)
    assert net["encoder"].layers[0].activation_relu_or_gelu == 1 and net["encoder"].use_nested_tensor


class BatchFirstBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(16, 32), gelu=nn.GELU(), c_proj=nn.Linear(32, 16)))

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class BatchFirstTower(nn.Module):
    """The blocks of a tower of open_clip, with a projection behind them."""

    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList([BatchFirstBlock(), BatchFirstBlock()])
        self.proj = nn.Linear(16, 8)

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return self.proj(x[:, 0])


def test_a_tower_of_blocks_with_torchs_attention_has_default_targets():
    torch.manual_seed(0)
    model = get_peft_model(
        BatchFirstTower(), MolaConfig(variant="grad", num_experts=3, r=2, init_weights=False)
    ).eval()
    names = {name for name, module in model.get_base_model().named_modules() if isinstance(module, MolaLayer)}
    parts = ("attn", "attn.base_layer.out_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"resblocks.{block}.{part}" for block in range(2) for part in parts}
    x, tasks = torch.randn(4, 5, 16), torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        together = model(x, task_ids=tasks)
        for row, task in enumerate(tasks):
            assert torch.allclose(model(x[row : row + 1], task_ids=task[None])[0], together[row], atol=1e-5)
        assert not torch.allclose(model(x, task_ids=(tasks + 1) % 3), together, atol=1e-3)


def test_a_model_without_attention_of_torch_still_has_no_default_targets():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MolaConfig(variant="grad"))
