"""The adapted layers and their gradients against the formula, written out sample by sample with full weights."""

import pytest
import torch
from peft import get_peft_model
from testing.tiny_bases import naive_forward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
    router = model.base_model.model._mola.mola_router["second"].branches["all"]
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


def test_dropout_acts_on_the_input_of_the_adapter_only():
    model, x = make("linear, 3-D", "grad", dropout=0.5)
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
