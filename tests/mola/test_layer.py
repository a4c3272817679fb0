"""The adapted layers and their gradients against the formula, written out sample by sample with full weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing.tiny_bases import naive_forward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola import MolaConfig, MolaLayer, register_router

BATCH, EXPERTS = 5, 3
MIXED = torch.tensor([2, 0, 1, 0, 0])


def convolution(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


DENSE = {
    "linear, 2-D": (lambda: nn.Linear(5, 7), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), (5,)),
    "linear, 3-D": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear, 4-D": (lambda: nn.Linear(5, 7), (4, 2, 5)),
    "Conv1D, 2-D": (lambda: Conv1D(7, 5), (5,)),
    "Conv1D, 3-D": (lambda: Conv1D(7, 5), (4, 5)),
}
CONVOLUTIONS = {
    "1x1": (convolution(4, 6, 1), (4, 5, 6)),
    "3x3 padded": (convolution(4, 6, 3, padding=1), (4, 5, 6)),
    "without bias": (convolution(4, 6, 3, bias=False), (4, 5, 6)),
    "stride": (convolution(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "uneven": (convolution(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (4, 7, 6)),
    "dilated": (convolution(4, 6, 3, dilation=2), (4, 7, 6)),
    "same": (convolution(4, 6, 3, padding="same"), (4, 5, 6)),
    "two groups": (convolution(4, 6, 3, groups=2, padding=1), (4, 5, 6)),
    "grouped 1x1": (convolution(4, 8, 1, groups=4), (4, 5, 6)),
    "depthwise": (convolution(4, 4, 3, groups=4, padding=1), (4, 5, 6)),
    "depthwise, more channels": (convolution(4, 8, 3, groups=4, stride=2), (4, 7, 6)),
    "reflect": (convolution(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 6)),
    "circular, two groups": (convolution(4, 6, 3, padding=2, padding_mode="circular", groups=2), (4, 5, 6)),
    "replicate, dilated": (convolution(4, 6, 3, padding=1, dilation=2, padding_mode="replicate"), (4, 7, 6)),
}
LAYERS = DENSE | CONVOLUTIONS


class Net(nn.Module):
    """A model of one layer, or of several in a row."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
        return x


class Scores(nn.Module):
    """A router whose scores are a linear function of the mean input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, EXPERTS))
        self.bias = nn.Parameter(torch.linspace(0.5, -0.5, EXPERTS))

    def forward(self, x):
        return x.flatten(1).mean(1)[:, None] * self.weight + self.bias


register_router("scores of the mean", lambda config, model: Scores())


def layer_of(model) -> MolaLayer:
    return next(module for module in model.modules() if isinstance(module, MolaLayer))


def make(case: str, variant: str, seed: int = 0, **fields):
    new_layer, shape = LAYERS[case]
    torch.manual_seed(seed)
    net = Net(new_layer()).double()
    config = {"num_experts": EXPERTS, "r": 2, "alpha": 3.0, "init_weights": False, "target_modules": ["body.0"]}
    config |= {"router_input": "scores of the mean" if variant == "router" else None}
    model = get_peft_model(net, MolaConfig(variant=variant, **config | fields))
    return model, torch.randn(BATCH, *shape, dtype=torch.float64)


def gradients(output, upstream, leaves):
    return torch.autograd.grad((output * upstream).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("tasks", [MIXED, torch.full((BATCH,), 1)], ids=["mixed tasks", "one task"])
@pytest.mark.parametrize("case", LAYERS)
def test_the_grad_variant_equals_the_formula(case, tasks):
    model, x = make(case, "grad")
    layer = layer_of(model)
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    gamma = torch.eye(EXPERTS, dtype=torch.float64)[tasks]
    x.requires_grad_()
    found = model(x, task_ids=tasks)
    expected = naive_forward(layer.base_layer, x, [(A, B, gamma, 3.0 / 2)])
    assert (found - expected).abs().max() < 1e-10
    assert (found - layer.base_layer(x)).abs().max() > 1e-3
    upstream = torch.randn_like(found)
    for one, other in zip(
        gradients(found, upstream, [A, B, x]), gradients(expected, upstream, [A, B, x]), strict=True
    ):
        assert (one - other).abs().max() < 1e-10


@pytest.mark.parametrize("case", LAYERS)
def test_the_router_variant_equals_the_formula(case):
    model, x = make(case, "router", decorrelation_weight=0.0)
    layer = layer_of(model)
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    router = next(module for module in model.modules() if isinstance(module, Scores))
    x.requires_grad_()
    found = model(x)
    scores = torch.stack([row.mean() * router.weight + router.bias for row in x])
    gamma = scores.exp() / scores.exp().sum(1, keepdim=True)
    expected = naive_forward(layer.base_layer, x, [(A, B, gamma, 3.0 / 2)])
    assert (found - expected).abs().max() < 1e-10
    upstream, leaves = torch.randn_like(found), [A, B, x, router.weight, router.bias]
    for one, other in zip(gradients(found, upstream, leaves), gradients(expected, upstream, leaves), strict=True):
        assert other.abs().max() > 1e-6
        assert (one - other).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["linear, 3-D", "Conv1D, 3-D", "two groups"])
def test_two_active_adapters_add_up(case):
    model, x = make(case, "grad")
    second = MolaConfig(
        num_experts=2,
        r=4,
        alpha=1.0,
        init_weights=False,
        target_modules=["body.0"],
        router_input="scores of the mean",
        decorrelation_weight=0.0,
    )
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    layer = layer_of(model)
    router = model.base_model.model.mola.mola_router["second"].branches["all"]
    with torch.no_grad():
        router.weight = nn.Parameter(router.weight[:2])
        router.bias = nn.Parameter(router.bias[:2])
    scores = torch.stack([row.mean() * router.weight + router.bias for row in x])
    expected = naive_forward(
        layer.base_layer,
        x,
        [
            (layer.mola_A["default"], layer.mola_B["default"], torch.eye(EXPERTS).double()[MIXED], 3.0 / 2),
            (layer.mola_A["second"], layer.mola_B["second"], scores.softmax(1), 1.0 / 4),
        ],
    )
    assert (model(x, task_ids=MIXED) - expected).abs().max() < 1e-10
    model.set_adapter("second")
    only_second = naive_forward(
        layer.base_layer, x, [(layer.mola_A["second"], layer.mola_B["second"], scores.softmax(1), 1.0 / 4)]
    )
    assert (model(x) - only_second).abs().max() < 1e-10


def test_ranks_and_alphas_of_single_layers_follow_their_patterns():
    torch.manual_seed(0)
    net = Net(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)).double()
    config = MolaConfig(
        variant="grad",
        num_experts=EXPERTS,
        r=4,
        alpha=8.0,
        init_weights=False,
        target_modules=r"body\.\d",
        rank_pattern={"body.1": 2, r"body\.[12]": 6},
        alpha_pattern={"2": 1.0},
    )
    model = get_peft_model(net, config)
    expected = x = torch.randn(BATCH, 5, dtype=torch.float64)
    gamma = torch.eye(EXPERTS).double()[MIXED]
    for layer, (r, alpha) in zip(model.base_model.model.body, [(4, 8.0), (2, 8.0), (6, 1.0)], strict=True):
        A, B = layer.mola_A["default"], layer.mola_B["default"]
        assert (A.shape, B.shape) == ((EXPERTS, r, 5), (EXPERTS, 5, r))
        expected = naive_forward(layer.base_layer, expected, [(A, B, gamma, alpha / r)])
    assert (model(x, task_ids=MIXED) - expected).abs().max() < 1e-10


def test_the_shapes_of_a_grouped_convolution_are_those_of_its_weight():
    model, _ = make("two groups", "grad")
    layer = layer_of(model)
    assert layer.mola_A["default"].shape == (EXPERTS, 2, 2, 3, 3)
    assert layer.mola_B["default"].shape == (EXPERTS, 6, 2)


def test_a_new_adapter_has_no_effect_but_gets_a_gradient():
    model, x = make("linear, 3-D", "grad", init_weights=True)
    layer = layer_of(model)
    found = model(x, task_ids=MIXED)
    assert torch.equal(found, layer.base_layer(x))
    found.square().sum().backward()
    assert layer.mola_B["default"].grad.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("case", ["linear, 3-D", "two groups"])
def test_tokens_or_windows_that_were_folded_into_the_batch_keep_the_weights_of_their_sample(case):
    model, x = make(case, "grad")
    layer = layer_of(model)
    folded = torch.randn(3 * BATCH, *x.shape[1:], dtype=torch.float64)
    found = []
    model.get_base_model().register_forward_hook(lambda *_: found.append(layer(folded)), prepend=True)
    model(x, task_ids=MIXED)
    gamma = torch.eye(EXPERTS).double()[[2, 2, 2, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    assert (found[0] - naive_forward(layer.base_layer, folded, [(A, B, gamma, 1.5)])).abs().max() < 1e-10
    folded = folded[:7]
    with pytest.raises(ValueError, match="a batch of 7, but task_ids had 5 samples"):
        model(x, task_ids=MIXED)


# Layers and inputs of a sample for which a batch of small products is computed, and those of so few positions that one
# product with all experts is.
MANY = {
    "linear": (lambda: nn.Linear(5, 7), (40, 5)),
    "linear without bias, 4-D": (lambda: nn.Linear(5, 7, bias=False), (4, 9, 5)),
    "Conv1D": (lambda: Conv1D(7, 5), (40, 5)),
    "few positions, 2-D": (lambda: nn.Linear(5, 7), (5,)),
    "few positions, 3-D": (lambda: nn.Linear(5, 7), (2, 5)),
    "convolution": (convolution(4, 6, 3, stride=2, padding=1), (4, 9, 8)),
    "convolution, groups": (convolution(4, 6, (3, 1), groups=2, dilation=(2, 1)), (4, 9, 8)),
    "convolution, circular": (convolution(4, 6, 3, padding=2, padding_mode="circular", groups=2), (4, 5, 6)),
    "convolution, same": (convolution(4, 6, (3, 2), padding="same", dilation=2), (4, 5, 6)),
    "depthwise": (convolution(4, 8, 3, groups=4), (4, 5, 6)),
}


def loop_over_samples(base, x, A, B, experts, scale):
    """Compute the base layer plus the expert of each sample, one sample after the other."""
    rows = []
    for row, expert in zip(x, experts, strict=True):
        one = torch.zeros(1, len(A), dtype=x.dtype)
        one[0, expert] = 1
        rows.append(naive_forward(base, row[None], [(A, B, one, scale)]))
    return torch.cat(rows)


@pytest.mark.parametrize("num_experts", [2, 12])
@pytest.mark.parametrize("case", MANY)
def test_mixed_tasks_equal_a_loop_over_the_samples(case, num_experts):
    new_layer, shape = MANY[case]
    torch.manual_seed(num_experts)
    config = MolaConfig(variant="grad", num_experts=num_experts, r=3, init_weights=False, target_modules=["body.0"])
    model = get_peft_model(Net(new_layer()).double(), config)
    layer = layer_of(model)
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    tasks = torch.randint(num_experts - 1, (7,))
    tasks[0] = num_experts - 1
    x = torch.randn(7, *shape, dtype=torch.float64).requires_grad_()
    found, expected = model(x, task_ids=tasks), loop_over_samples(layer.base_layer, x, A, B, tasks.tolist(), 16 / 3)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-12
    upstream = torch.randn_like(found)
    for own, other in zip(
        gradients(found, upstream, [A, B, x]), gradients(expected, upstream, [A, B, x]), strict=True
    ):
        assert (own - other).abs().max() < 1e-12 * max(1, other.abs().max())
    unused = [expert for expert in range(num_experts) if expert not in tasks]
    if unused:
        assert gradients(model(x, task_ids=tasks), upstream, [A])[0][unused].abs().max() == 0


class SequenceFirst(Net):
    """A model that hands its layers `(L, B, ...)`."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("variant", ["grad", "router"])
@pytest.mark.parametrize("shape", [(30, 5), (2, 5), (6, 7, 5)], ids=["30 tokens", "2 tokens", "4-D"])
def test_a_layer_whose_input_has_the_sequence_first_weighs_its_second_dimension(shape, variant):
    torch.manual_seed(0)
    config = MolaConfig(
        variant=variant,
        num_experts=EXPERTS,
        r=2,
        init_weights=False,
        target_modules=["body.0"],
        router_input="scores of the mean",
        decorrelation_weight=0.0,
    )
    model = get_peft_model(SequenceFirst(nn.Linear(5, 7)).double(), config)
    layer = layer_of(model)
    layer.batch_dim = 1
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    x = torch.randn(BATCH, *shape, dtype=torch.float64).requires_grad_()
    gamma = torch.eye(EXPERTS, dtype=torch.float64)[MIXED]
    if variant == "router":
        found, gamma = model(x), model.base_model.routing.mola_router["default"].branches["all"](x).softmax(1)
    else:
        found = model(x, task_ids=MIXED)
    expected = naive_forward(layer.base_layer, x, [(A, B, gamma, 8.0)])
    assert (found - expected).abs().max() < 1e-12
    upstream = torch.randn_like(found)
    for own, other in zip(
        gradients(found, upstream, [A, B, x]), gradients(expected, upstream, [A, B, x]), strict=True
    ):
        assert (own - other).abs().max() < 1e-12 * max(1, other.abs().max())


class Windows(Net):
    """A model that cuts each sample into windows, which follow one another in the batch of its layers."""

    def forward(self, x):
        return super().forward(x.unflatten(1, (3, -1)).flatten(0, 1)).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("length", [6, 60])
def test_windows_of_a_sample_share_its_expert(length):
    torch.manual_seed(0)
    config = MolaConfig(variant="grad", num_experts=EXPERTS, r=2, init_weights=False, target_modules=["body.0"])
    model = get_peft_model(Windows(nn.Linear(5, 7)).double(), config)
    layer = layer_of(model)
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    x = torch.randn(BATCH, length, 5, dtype=torch.float64)
    expected = loop_over_samples(layer.base_layer, x, A, B, MIXED.tolist(), 8.0)
    assert (model(x, task_ids=MIXED) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["linear", "few positions, 3-D", "convolution, groups"])
def test_mixed_tasks_under_autocast(case, dtype):
    new_layer, shape = MANY[case]
    torch.manual_seed(0)
    config = MolaConfig(variant="grad", num_experts=EXPERTS, r=2, init_weights=False, target_modules=["body.0"])
    model = get_peft_model(Net(new_layer()), config)
    layer = layer_of(model)
    x = torch.randn(BATCH, *shape)
    with torch.autocast("cpu", dtype):
        found = model(x, task_ids=MIXED)
    found.float().sum().backward()
    A, B = layer.mola_A["default"], layer.mola_B["default"]
    expected = loop_over_samples(layer.base_layer, x, A, B, MIXED.tolist(), 8.0)
    assert found.dtype == dtype and A.grad.dtype == torch.float32
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


def count_operations(model, x, **inputs):
    with FlopCounterMode(display=False) as counter:
        model(x, **inputs).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(50, 64), (8, 12, 64)])
def test_mixed_tasks_cost_as_much_as_lora_of_the_rank_of_one_expert(shape):
    x, tasks = torch.randn(8, *shape), torch.arange(8)
    found = []
    for num_experts in (8, 64):
        config = MolaConfig(variant="grad", num_experts=num_experts, r=4, target_modules=["body.0"])
        found.append(count_operations(get_peft_model(Net(nn.Linear(64, 96)), config), x, task_ids=tasks))
    lora = get_peft_model(Net(nn.Linear(64, 96)), LoraConfig(r=4, target_modules=["body.0"]))
    assert found == [count_operations(lora, x)] * 2


def test_mixed_tasks_in_a_convolution_cost_as_much_with_many_experts():
    x, tasks = torch.randn(8, 16, 9, 9), torch.arange(8)
    found = []
    for num_experts in (8, 64):
        config = MolaConfig(variant="grad", num_experts=num_experts, r=4, target_modules=["body.0"])
        model = get_peft_model(Net(nn.Conv2d(16, 32, 3)), config)
        with FlopCounterMode(display=False) as counter:
            model(x, task_ids=tasks)
        found.append(counter.get_total_flops())
    lora = get_peft_model(Net(nn.Conv2d(16, 32, 3)), LoraConfig(r=4, target_modules=["body.0"]))
    with FlopCounterMode(display=False) as counter:
        lora(x)
    assert found == [counter.get_total_flops()] * 2


@pytest.mark.parametrize("variant", ["grad", "router"])
@pytest.mark.parametrize("case", ["linear", "few positions, 2-D", "convolution, groups"])
def test_a_layer_compiles_to_one_graph(case, variant):
    new_layer, shape = MANY[case]
    torch._dynamo.reset()
    config = MolaConfig(variant=variant, num_experts=EXPERTS, r=2, init_weights=False, target_modules=["body.0"])
    config.router_input = "scores of the mean" if variant == "router" else None
    model = get_peft_model(Net(new_layer()).double(), config)
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    inputs = {"task_ids": MIXED} if variant == "grad" else {}
    found = torch.compile(model, fullgraph=True, backend="eager")(x, **inputs)
    assert (found - model(x, **inputs)).abs().max() < 1e-12


def test_rank_stabilised_adapters_scale_by_the_root_of_each_layers_rank():
    torch.manual_seed(0)
    net = Net(nn.Linear(5, 5), nn.Linear(5, 5), nn.Conv2d(5, 5, 1)).double()
    fields = {"num_experts": EXPERTS, "r": 4, "alpha": 8.0, "init_weights": False, "target_modules": r"body\.\d"}
    patterns = {"rank_pattern": {"body.1": 9}, "alpha_pattern": {"body.2": 3.0}}
    model = get_peft_model(net, MolaConfig(variant="grad", use_rslora=True, **fields, **patterns))
    scales = [layer.mola_scaling["default"] for layer in model.base_model.model.body]
    assert scales == pytest.approx([8 / 2, 8 / 3, 3 / 2])
    layer = layer_of(model)
    x, A, B = torch.randn(4, 5, dtype=torch.float64), layer.mola_A["default"], layer.mola_B["default"]
    model.base_model.set_task(2)
    assert (layer.get_delta_weight("default", 2) - 4 * B[2] @ A[2]).abs().max() < 1e-12
    assert (layer(x) - layer.base_layer(x) - 4 * x @ A[2].T @ B[2].T).abs().max() < 1e-12
    with pytest.raises(ValueError, match="use_rslora=1: must be True or False"):
        MolaConfig(use_rslora=1)


@pytest.mark.parametrize("length", [4, 40])
def test_dropout_acts_on_the_input_of_the_adapter_only(length):
    model, x = make("linear, 3-D", "grad", dropout=0.5)
    x = x.repeat(1, length // 4, 1)
    layer = layer_of(model)
    model.train()
    torch.manual_seed(3)
    found = model(x, task_ids=MIXED)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    A, B, base = layer.mola_A["default"], layer.mola_B["default"], layer.base_layer
    rows = [base(x[i]) + 1.5 * dropped[i] @ A[t].T @ B[t].T for i, t in enumerate(MIXED)]
    assert (found - torch.stack(rows)).abs().max() < 1e-10
    model.eval()
    gamma = torch.eye(EXPERTS).double()[MIXED]
    assert (model(x, task_ids=MIXED) - naive_forward(base, x, [(A, B, gamma, 1.5)])).abs().max() < 1e-10


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 2), nn.Embedding(4, 3), nn.Conv3d(1, 1, 1), nn.LayerNorm(5)])
def test_other_layers_are_refused_by_name(layer):
    with pytest.raises(TypeError, match="is not supported. MoLA adapts `torch.nn.Linear`, `torch.nn.Conv2d`"):
        get_peft_model(Net(layer), MolaConfig(variant="grad", target_modules=["body.0"]))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(value):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("variant", ["router", "grad"])
def test_no_weight_matrix_per_sample_is_ever_built(variant):
    batch, width = 32, 64
    config = MolaConfig(
        variant=variant, num_experts=3, r=2, target_modules=["body.0"], router_input="embeddings", init_weights=False
    )
    model = get_peft_model(Net(nn.Linear(width, width)), config).train()
    with LargestTensor() as largest:
        model(torch.randn(batch, width), task_ids=torch.arange(batch) % 3).sum().backward()
    assert width * width <= largest.elements < batch * width * width / 4
