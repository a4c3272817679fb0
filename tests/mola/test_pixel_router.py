"""The network of a router on pixels: its layers, its default, and that a saved adapter keeps its own."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from testing.tiny_bases import adapted, pictures, tiny_resnet, tiny_vit
from testing.tiny_models import tiny_clip
from torch import nn

from hf_dissect.mola import MolaConfig, PixelRouter


def count_layers(model) -> int:
    """Number of layers with weights, as in the name of a ResNet."""
    (router,) = (module for module in model.modules() if isinstance(module, PixelRouter))
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in router.modules())


def forget(folder, *names: str, **fields) -> None:
    """Rewrite a saved configuration without some fields, as an earlier version wrote it."""
    path = folder / "adapter_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(kept | fields))


# ---- the networks ----


@pytest.mark.parametrize(
    ("architecture", "layers", "parameters", "first"), [("resnet20", 20, 269_332, 32), ("resnet8", 8, 74_900, 16)]
)
def test_the_networks_are_those_for_small_images(architecture, layers, parameters, first):
    router = PixelRouter(4, architecture=architecture)
    convolutions = [module for module in router.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == layers
    assert sorted({layer.out_channels for layer in convolutions}) == [16, 32, 64]
    # Three by three weights of each convolution, two of each channel of its norm, and the scores.
    widths = [(layer.in_channels, layer.out_channels) for layer in convolutions]
    assert sum(9 * inner * outer + 2 * outer for inner, outer in widths) + 65 * 4 == parameters
    assert sum(parameter.numel() for parameter in router.parameters()) == parameters
    sizes = []
    router.stem.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    router.blocks.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    for shape in ((32, 32), (70, 45)):
        assert router(torch.randn(2, 3, *shape)).shape == (2, 4)
    assert sizes == 2 * [(first, first), (first // 4, first // 4)], "larger images are reduced to 32 x 32"
    PixelRouter(4, image_size=None, architecture=architecture)(torch.randn(2, 3, 70, 44))
    assert PixelRouter(4, num_channels=1, architecture=architecture)(torch.randn(2, 1, 9, 13)).shape == (2, 4)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, lambda: tiny_clip()[0]])
def test_a_new_adapter_has_the_small_network(make):
    assert count_layers(adapted(make())) == 8
    assert count_layers(adapted(make(), router_architecture="resnet20")) == 20
    assert MolaConfig().router_architecture == MolaConfig(variant="grad").router_architecture == "resnet8"


# ---- saved adapters ----


@pytest.mark.parametrize("architecture", ["resnet8", "resnet20"])
def test_a_saved_adapter_has_the_network_it_was_saved_with(architecture, tmp_path):
    model, batch = adapted(tiny_vit(), router_architecture=architecture).eval(), pictures()
    expected = model(**batch).last_hidden_state
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["router_architecture"] == architecture
    assert torch.equal(PeftModel.from_pretrained(tiny_vit(), tmp_path)(**batch).last_hidden_state, expected)


@pytest.fixture
def earlier(tmp_path):
    """An adapter as earlier versions saved it, with the output that it had."""
    model = adapted(tiny_vit(), router_architecture="resnet20").eval()
    model.save_pretrained(tmp_path)
    forget(tmp_path, "router_architecture")
    return tmp_path, model(**pictures()).last_hidden_state


@pytest.mark.parametrize(
    "load",
    [
        lambda base, folder: PeftModel.from_pretrained(base, folder),
        lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True).eval(),
        lambda base, folder: PeftModel.from_pretrained(base, folder, config=PeftConfig.from_pretrained(folder)),
        lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
        lambda base, folder: (base.load_adapter(str(folder)), base)[1],
    ],
    ids=["peft", "trainable", "configuration", "meta", "transformers"],
)
@pytest.mark.parametrize("stripped", [(), ("peft_version", "task_norms", "use_rslora")])
def test_an_adapter_of_an_earlier_version_has_the_network_of_that_version(load, stripped, earlier, tmp_path):
    folder, expected = earlier
    forget(folder, *stripped)
    model = load(tiny_vit(), folder)
    assert count_layers(model) == 20
    assert torch.equal(model.eval()(**pictures()).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["router_architecture"] == "resnet20", "from now on it is named"


def test_copies_of_a_configuration_keep_the_network(earlier):
    config = MolaConfig.from_pretrained(earlier[0])
    kinds = [copy.deepcopy(config), dataclasses.replace(config, r=3), MolaConfig(**config.to_dict())]
    kinds.append(PEFT_TYPE_TO_CONFIG_MAPPING["MOLA"](**(config.to_dict() | {"router_architecture": None})))
    assert [kind.router_architecture for kind in kinds] == ["resnet20"] * 4
    new = MolaConfig()
    assert dataclasses.replace(new, r=3).router_architecture == "resnet8"
    assert MolaConfig(**new.to_dict()).router_architecture == "resnet8"


def test_two_adapters_of_one_model_have_networks_of_their_own(earlier):
    folder, expected = earlier
    model = PeftModel.from_pretrained(tiny_vit(), folder, adapter_name="earlier")
    model.add_adapter("new", MolaConfig(r=2, num_experts=3, target_modules=["q_proj"]))
    layers = [sum(isinstance(part, nn.Conv2d) for part in network.modules()) + 1 for network in networks(model)]
    assert sorted(layers) == [8, 20]
    model.set_adapter("earlier")
    assert torch.equal(model.eval()(**pictures()).last_hidden_state, expected)


def networks(model) -> list[PixelRouter]:
    return [module for module in model.modules() if isinstance(module, PixelRouter)]


@pytest.mark.parametrize(("saved", "named"), [("resnet8", "resnet20"), ("resnet20", "resnet8")])
def test_weights_of_the_other_network_are_refused(saved, named, tmp_path):
    adapted(tiny_vit(), router_architecture=saved).save_pretrained(tmp_path)
    forget(tmp_path, router_architecture=named)
    with pytest.raises(ValueError, match=rf"not the network that router_architecture='{named}' names; set this to"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)
