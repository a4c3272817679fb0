"""Bases with quantised weights: an adapter computes, trains and merges as a LoRA does, or is refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from testing.tiny_bases import adapted, tiny_resnet
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

from hf_dissect.mola import MolaConfig, MolaLayer, mola_routing

RANK, TASK = 4, 1
TARGETS = ["q_proj", "v_proj"]
TASK_IDS = torch.tensor([1, 0, 2])
IDS = torch.arange(18).reshape(3, 6)


def bits_8():
    return BitsAndBytesConfig(load_in_8bit=True)


def bits_4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def normal_float_4():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao(name):
    def make():
        return TorchAoConfig(quant_type=getattr(pytest.importorskip("torchao.quantization"), name)())

    return make


KINDS = {
    "bitsandbytes 8": ("bitsandbytes", "bnb 8bit", bits_8),
    "bitsandbytes 4": ("bitsandbytes", "bnb 4bit", bits_4),
    "bitsandbytes nf4": ("bitsandbytes", "bnb 4bit", normal_float_4),
    "torchao int8": ("torchao", "torchao", torchao("Int8WeightOnlyConfig")),
    "torchao int8 dynamic": ("torchao", "torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao float8": ("torchao", "torchao", torchao("Float8WeightOnlyConfig")),
    "torchao intx": ("torchao", "torchao", torchao("IntxWeightOnlyConfig")),
    "hqq": ("hqq", "hqq", None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(kind, folder):
    module, _, settings = KINDS[kind]
    pytest.importorskip(module)
    if settings is not None:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(), device_map={"": "cpu"})
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # transformers loads them on accelerators only

    base = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(base.named_modules()):
        if name.endswith("_proj"):
            settings = BaseQuantizeConfig(nbits=8, group_size=32)
            base.set_submodule(name, HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu"))
    return base


def mola(base, **fields):
    model = adapted(base, **{"variant": "grad", "r": RANK, "target_modules": TARGETS} | fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mola_B" in name:
                parameter.mul_(0.3)
    return model


def lora_of(model, base, task):
    """A LoRA on another copy of the base, with the weights of one expert."""
    lora = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights[name.replace("lora_", "mola_").replace(".weight", "")][task])
    return lora


def logits(model, **batch):
    with torch.no_grad():
        return model(input_ids=IDS, **batch).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe merge"])
def test_an_expert_does_what_a_lora_does(kind, safe_merge, folder):
    model = mola(load(kind, folder))
    layers = [module for module in model.modules() if isinstance(module, MolaLayer)]
    assert {layer.quantization_backend.backend_name for layer in layers} == {KINDS[kind][1]}
    assert f"quantization_backend='{KINDS[kind][1]}'" in repr(layers[0])
    with model.disable_adapter():
        plain = logits(model)
    # No pass before a merge: on some processors, PEFT does not read bitsandbytes' weights of 4 bits after one.
    lora, merged, restored = (lora_of(model, load(kind, folder), TASK) for _ in range(3))
    expected = logits(lora)
    torch.testing.assert_close(logits(model, task_ids=torch.full((3,), TASK)), expected, rtol=1e-4, atol=1e-4)

    def error(found):
        return ((found - expected).abs().mean() / (expected - plain).abs().mean()).item()

    merged.merge_adapter()
    restored.merge_adapter()
    restored.unmerge_adapter()
    model.set_task(TASK)
    model.merge_adapter(safe_merge=safe_merge)
    assert error(logits(model)) < 1.2 * error(logits(merged)) + 1e-3 < 0.5
    model.unmerge_adapter()
    assert error(logits(model, task_ids=torch.full((3,), TASK))) < 1.2 * error(logits(restored)) + 1e-3 < 0.5
    base = model.merge_and_unload(safe_merge=safe_merge)
    assert mola_routing(base) is None and not any(isinstance(module, MolaLayer) for module in base.modules())
    assert error(logits(base)) < 2 * error(logits(merged)) + 1e-3  # rounded three times


# Layers of torchao that quantise their input as well have no gradient, with a LoRA neither.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao int8 dynamic"])
@pytest.mark.parametrize("variant", ["grad", "router"])
def test_the_experts_get_the_gradients_of_the_formula(kind, variant, folder):
    """Those of the layer `W x + b` with the dequantised weight, plus the experts, in double precision."""
    model = mola(load(kind, folder), variant=variant).train()
    layer = next(module for module in model.modules() if isinstance(module, MolaLayer))
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    keywords = {"task_ids": TASK_IDS} if variant == "grad" else {}
    with torch.no_grad():
        model(input_ids=IDS, **keywords)
    handle.remove()
    x, output = seen[0]
    weights = F.one_hot(TASK_IDS, 3).double() if variant == "grad" else model.routing_weights()["model"].double()
    A, B = layer.mola_A["default"].detach().double(), layer.mola_B["default"].detach().double()
    expected = layer.base_layer(x).double()
    expected = expected + 16 / RANK * torch.einsum("be,eor,eri,bti->bto", weights, B, A, x.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    model(input_ids=IDS, labels=IDS, **keywords).loss.backward()
    for name, parameter in model.named_parameters():
        if "mola_A" in name or "mola_B" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        if "base_layer" in name:
            assert parameter.grad is None, name


@pytest.mark.parametrize("kind", ["bitsandbytes 8", "torchao int8", "hqq"])
def test_two_adapters_are_merged_with_one_rounding(kind, folder):
    model = mola(load(kind, folder))
    model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_task(2, "default")
    model.base_model.set_task(0, "second")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.get_base_weight() + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    scale = expected.abs().max()
    model.merge_adapter()
    assert set(layer.merged_adapters) == {"default", "second"}
    assert (layer.get_base_weight() - expected).abs().max() < scale / 127
    model.unmerge_adapter()
    assert not layer.merged


@pytest.mark.parametrize("kind", ["bitsandbytes 4", "torchao int8"])
def test_saving_and_loading(kind, folder, tmp_path):
    from peft import PeftModel

    model = mola(load(kind, folder))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(kind, folder), tmp_path).eval()
    torch.testing.assert_close(logits(again, task_ids=TASK_IDS), logits(model, task_ids=TASK_IDS))


@pytest.mark.parametrize("kind", ["bitsandbytes 8", "bitsandbytes 4", "torchao int8"])
@pytest.mark.parametrize("train_base", ["targets", "all"])
def test_a_quantised_base_cannot_be_trained(kind, train_base, folder):
    with pytest.raises(ValueError, match="train_base: .*weight of .* cannot be trained, because its weight is"):
        mola(load(kind, folder), train_base=train_base)


def test_torchao_without_transformers_is_not_merged(folder):
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    base = AutoModelForCausalLM.from_pretrained(folder)
    torchao.quantize_(base, Int8WeightOnlyConfig())
    model = mola(base)
    before = logits(model, task_ids=TASK_IDS)
    model.set_task(TASK)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"\(torchao\): .* again; it can if .* TorchAoConfig. Use the adapter"):
            merge()
    assert torch.equal(logits(model, task_ids=TASK_IDS), before)


def forward_only(kind):
    """A real layer of a library whose weights PEFT cannot write."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    return ForwardOnlyQuantizationBackend(kind)


@pytest.mark.parametrize("kind", ["gptq", "awq", "aqlm", "eetq"])
def test_what_peft_cannot_write_is_not_merged_and_nothing_is_changed(kind, folder):
    """Their libraries need an accelerator, so a plain layer gets the backend that PEFT finds for theirs."""
    model = mola(AutoModelForCausalLM.from_pretrained(folder))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [module for module in model.modules() if isinstance(module, MolaLayer)]
    layers[-1].quantization_backend = forward_only(kind)
    model.set_task(TASK)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"cannot be merged .*quantised \({kind}\).* without merging it"):
            merge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="cannot be merged"):
        layers[-1].merge()


class Packed(nn.Linear):
    """Two numbers in each byte."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // 2, dtype=torch.uint8), requires_grad=False)


class Halves(nn.Linear):
    """Half of the weight is stored, as floating-point numbers."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // 2))


class Fake(nn.Linear):
    """Rounds its weight in each pass, as layers for quantisation-aware training do."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight_fake_quant = nn.Identity()


class Codebook(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        del self.weight
        self.codes = nn.Parameter(torch.zeros(3))


class ScaledConvolution(nn.Conv2d):
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 1)
        self.weight = nn.Parameter(self.weight.detach().to(torch.int8), requires_grad=False)


UNKNOWN = {
    "packed": (lambda: Packed(8, 8), "stored as torch.uint8"),
    "packed, on the meta device": (lambda: Packed(8, 8).to("meta"), "stored as torch.uint8"),
    "int8": (lambda: QuantizedLinear(8, 8), "stored as torch.int8"),
    "int2": (lambda: QuantizedLinear(8, 8, num_bits=2), "stored as torch.uint8"),
    "float8": (lambda: FP8Linear(128, 128), "stored as torch.float8_e4m3fn"),
    "ternary": (lambda: AutoBitLinear(8, 8), "has the attribute online_quant"),
    "halves": (lambda: Halves(8, 8), r"has the shape \(8, 4\) instead of \(8, 8\)"),
    "training": (lambda: Fake(8, 8), "has the attribute weight_fake_quant"),
    "codebook": (lambda: Codebook(8, 8), "it has no weight"),
    "convolution": (lambda: ScaledConvolution(8, 8), "stored as torch.int8"),
}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("variant", ["grad", "router"])
def test_unknown_kinds_are_refused_by_name(kind, variant):
    make, reason = UNKNOWN[kind]
    layer = make()
    message = (
        rf"{type(layer).__qualname__}\) is quantised in a way that PEFT does not know: .*{reason}.*exclude_modules"
    )
    with pytest.raises(TypeError, match=message):
        get_peft_model(Holder(layer), MolaConfig(variant=variant, target_modules=["layer"]))


def test_quanto_is_refused_by_name():
    quanto = pytest.importorskip("optimum.quanto")
    base = Holder(nn.Linear(32, 32))
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    with pytest.raises(TypeError, match="QLinear.*is quantised in a way that PEFT does not know"):
        get_peft_model(base, MolaConfig(variant="grad", target_modules=["layer"]))


class Named(nn.Linear):
    """Plain, whatever its attributes are called."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.quantity, self.quantile, self.scale = 3, 0.5, 2.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [nn.Linear, Named, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_plain_layers_are_merged_in_single_precision(dtype, make):
    torch.manual_seed(0)
    base = Holder(make(64, 64)).to(dtype)
    weight = base.layer.weight.detach().clone()
    model = adapted(base, variant="grad", target_modules=["layer"])
    layer = model.base_model.model.layer
    assert layer.quantization_backend is None
    A, B = layer.mola_A["default"][TASK].detach(), layer.mola_B["default"][TASK].detach()
    expected = (weight.double() + 16 / 2 * (B.double() @ A.double())).to(dtype)
    model.set_task(TASK)
    model.merge_adapter()
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_base_on_the_meta_device_gets_an_adapter():
    with torch.device("meta"):
        base = Holder(nn.Linear(8, 8))
    model = get_peft_model(base, MolaConfig(variant="grad", target_modules=["layer"]), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.set_task(0)
    model.merge_adapter()
    assert model.base_model.model.layer.weight.is_meta


def test_a_model_that_is_quantised_in_part_is_adapted_elsewhere():
    base = tiny_resnet()
    base.extra = Packed(8, 8)
    assert adapted(copy.deepcopy(base), variant="grad", target_modules=["convolution"])
    with pytest.raises(ValueError, match="train_base: extra.weight of ResNetModel cannot be trained"):
        adapted(base, variant="grad", target_modules=["convolution"], train_base="all")
