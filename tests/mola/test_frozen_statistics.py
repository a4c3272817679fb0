"""What does not train does not change: running statistics of frozen layers stay, those of trained layers move."""

import copy

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from testing.tiny_bases import adapted, pictures, tiny_resnet
from torch import nn

from hf_dissect.mola.frozen_statistics import keep_frozen_statistics

CONVOLUTIONS = r".*\.convolution"
BATCH = {**pictures(), "task_ids": torch.tensor([0, 1, 2, 0])}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def moved(model, *inputs, **named):
    """Names of the buffers that two passes in training mode change."""
    before = buffers(model)
    model.train()
    for _ in range(2):
        model(*inputs, **named)
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


@pytest.mark.parametrize("fields", [{"variant": "grad"}, {}], ids=["grad", "router"])
def test_mola_keeps_the_statistics_of_a_frozen_base_in_any_training_loop(fields):
    model = adapted(tiny_resnet(), target_modules=CONVOLUTIONS, **fields)
    # The router, which trains, has batch norm of its own.
    assert not {name for name in moved(model, **BATCH) if "mola_router" not in name}


def test_mola_lets_the_statistics_of_a_trained_base_and_of_saved_modules_move():
    model = adapted(tiny_resnet(), variant="grad", train_base="all", target_modules=CONVOLUTIONS)
    assert len(moved(model, **BATCH)) == len(buffers(model)) > 0
    model = adapted(tiny_resnet(), variant="grad", train_base="targets", target_modules=CONVOLUTIONS)
    assert len(moved(model, **BATCH)) == len(buffers(model)), "they are saved with the trained convolutions"
    model.requires_grad_(False)
    assert not moved(model, **BATCH)
    fields = {"target_modules": CONVOLUTIONS, "modules_to_save": ["embedder.embedder.normalization"]}
    lora = get_peft_model(tiny_resnet(), LoraConfig(r=2, **fields))
    for model, batch in ((adapted(tiny_resnet(), variant="grad", **fields), BATCH), (lora, pictures())):
        keep_frozen_statistics(model)
        names = moved(model, **batch)
        assert len(names) == 3 and all("embedder.normalization.modules_to_save.default" in name for name in names)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_keeps_statistics_whether_or_not_biases_train(bias):
    model = get_peft_model(tiny_resnet(), LoraConfig(r=2, target_modules=CONVOLUTIONS, bias=bias))
    keep_frozen_statistics(model)
    assert not moved(model, **pictures())


def test_norm_tuning_trains_the_norm_with_its_statistics():
    model = get_peft_model(tiny_resnet(), LNTuningConfig(target_modules=r".*embedder\.normalization"))
    keep_frozen_statistics(model)
    names = moved(model, **pictures())
    assert len(names) == 3 and all("ln_tuning_layers.default" in name for name in names)


class Counted(nn.Module):
    """A norm of a user, which names its statistics as it likes and contains dropout."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("centre", torch.zeros(size))

    def forward(self, x):
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.5)
        return self.dropout((x - self.centre) * self.weight)


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (4, 6, 2, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (4, 6, 3)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), (4, 6)),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), (4, 6)),
    "of a user": (lambda: Counted(6), (4, 6)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_follows_its_weights_at_any_time(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(nn.Identity(), make(), nn.Dropout(0.5)), torch.randn(shape)
    keep_frozen_statistics(model)
    assert moved(model, x)
    model.requires_grad_(False)
    assert not moved(model, x) and model.training and not torch.equal(model(x), model(x)), "dropout must stay"
    twin = copy.deepcopy(model)
    assert not moved(twin, x)
    twin.requires_grad_(True)
    assert moved(twin, x) and not moved(model, x), "a copy follows its own weights"


def test_a_layer_without_weights_follows_the_layers_around_it():
    def block():
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))

    model, x = nn.Sequential(block(), block(), nn.BatchNorm1d(6, affine=False)), torch.randn(4, 6)
    model[0].requires_grad_(False)
    keep_frozen_statistics(model)
    assert {name.partition(".")[0] for name in moved(model, x)} == {"1", "2"}
    adapter = get_peft_model(nn.Sequential(block(), block()), LoraConfig(r=2, target_modules=["1.0"]))
    keep_frozen_statistics(adapter)
    assert not moved(adapter, x), "the weights of the adapter are not those of the base"


def test_hooks_are_not_added_twice_and_compile():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), torch.randn(4, 6)
    model[1].requires_grad_(False)
    for _ in range(3):
        keep_frozen_statistics(model)
    assert len(model[1]._forward_pre_hooks) == 1
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert not moved(compiled, x) and not moved(compiled, x)
    assert torch.allclose(compiled(x), copy.deepcopy(model).eval()(x))
