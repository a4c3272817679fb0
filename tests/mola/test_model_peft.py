"""The ways in which PEFT and transformers make, load, switch and remove adapters, with a MoLA adapter."""

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from testing.tiny_bases import (
    adapted,
    pictures,
    tiny_bert,
    tiny_bert_classifier,
    tiny_regnet,
    tiny_resnet,
    tiny_vit,
    tokens,
)
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from transformers import AutoModel, CLIPModel

from hf_dissect.mola import MolaConfig, MolaLayer, MolaModel, Router, mola_routing

TASKS = torch.tensor([2, 0, 1, 0])
VARIANTS = [{"variant": "grad"}, {"router_input": "pixels"}, {"router_input": "embeddings"}]


def clip_batch():
    model, processor = tiny_clip()
    return tiny_inputs(model, processor, CAPTIONS[:4])


def outputs(model, batch, task_ids=TASKS):
    with torch.no_grad():
        found = model(**batch, task_ids=task_ids)
    return found["logits_per_image"] if "logits_per_image" in found else found["last_hidden_state"]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module", params=range(3), ids=["grad", "pixels", "embeddings"])
def saved(request, tmp_path_factory):
    """A CLIP model with an adapter, both saved; the batch, and what the adapter computes."""
    folder = tmp_path_factory.mktemp("saved")
    base, _ = tiny_clip()
    base.save_pretrained(folder / "base")
    base = CLIPModel.from_pretrained(folder / "base")
    model = adapted(base, **VARIANTS[request.param])
    batch = clip_batch()
    model.train()(**batch, task_ids=TASKS)  # moves the statistics of the pixel router's batch-norms
    model.eval().save_pretrained(folder / "adapter")
    return folder, batch, outputs(model, batch), VARIANTS[request.param]


def new_base(folder):
    return CLIPModel.from_pretrained(folder / "base")


# ---- loading ----


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_peft_loads_it(saved, is_trainable, low_cpu_mem_usage):
    folder, batch, expected, fields = saved
    model = PeftModel.from_pretrained(
        new_base(folder), folder / "adapter", is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert isinstance(model.base_model, MolaModel)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert torch.equal(outputs(model, batch), expected)
    if is_trainable:
        assert trainable(model) == {name for name, _ in model.named_parameters() if ".mola_" in name}
        assert any("mola_router" in name for name in trainable(model)) == ("variant" not in fields)
        model.train()(**batch, task_ids=TASKS).logits_per_image.sum().backward()
    else:
        assert trainable(model) == set()


def test_the_configuration_alone_comes_back_as_it_was(saved):
    folder, _, _, fields = saved
    config = PeftConfig.from_pretrained(folder / "adapter")
    assert type(config) is MolaConfig and config.inference_mode
    assert config.base_model_name_or_path == str(folder / "base")
    assert config.num_experts == 3 and config.variant == fields.get("variant", "router")
    again = MolaConfig.from_pretrained(folder / "adapter")
    assert again.to_dict() == config.to_dict()


def test_peft_finds_base_and_adapter_by_itself(saved):
    folder, batch, expected, _ = saved
    # Without a task type the class of the base is read from the adapter's auto_mapping.
    assert PeftConfig.from_pretrained(folder / "adapter").auto_mapping["base_model_class"] == "CLIPModel"
    model = AutoPeftModel.from_pretrained(folder / "adapter").eval()
    assert torch.equal(outputs(model, batch), expected)


@pytest.mark.parametrize(
    ("auto", "task_type", "make"),
    [
        (AutoPeftModelForFeatureExtraction, "FEATURE_EXTRACTION", tiny_bert),
        (AutoPeftModelForSequenceClassification, "SEQ_CLS", tiny_bert_classifier),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"variant": "grad", "default_task": 1}], ids=["router", "grad"])
def test_peft_models_of_a_task_type(auto, task_type, make, fields, tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    model, batch = adapted(base, task_type=task_type, **fields), tokens()
    with torch.no_grad():
        expected = model(**batch)[0]
    model.save_pretrained(tmp_path / "adapter")
    options = {"num_labels": 3} if task_type == "SEQ_CLS" else {}
    loaded = auto.from_pretrained(tmp_path / "adapter", **options).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], expected)
    model.train()(**batch)


def test_transformers_loads_it(saved):
    folder, batch, expected, _ = saved
    base = new_base(folder)
    base.load_adapter(str(folder / "adapter"))
    assert torch.equal(outputs(base.eval(), batch), expected)
    assert mola_routing(base) is not None
    base.disable_adapters()
    assert torch.equal(outputs(base, batch), outputs(new_base(folder).eval(), batch, None))
    base.enable_adapters()
    assert torch.equal(outputs(base, batch), expected)


def test_auto_model_loads_base_and_adapter_from_the_folder_of_the_adapter(saved):
    folder, batch, expected, _ = saved
    model = AutoModel.from_pretrained(folder / "adapter").eval()
    assert type(model) is CLIPModel and torch.equal(outputs(model, batch), expected)


def test_transformers_adds_trains_and_saves_one(tmp_path):
    batch = clip_batch()
    base, _ = tiny_clip()
    plain = outputs(base, batch, None)
    base.add_adapter(MolaConfig(variant="grad", num_experts=3, r=2), adapter_name="mine")
    assert trainable(base) and all("mola_" in name and "mine" in name for name in trainable(base))
    assert torch.equal(outputs(base.eval(), batch), plain)
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.1)
    base.train()(**batch, task_ids=TASKS).logits_per_image.diagonal().sum().backward()
    optimizer.step()
    expected = outputs(base.eval(), batch)
    assert not torch.equal(expected, plain)
    base.save_pretrained(tmp_path)
    fresh, _ = tiny_clip()
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(outputs(fresh.eval(), batch), expected)


def test_the_name_of_the_adapter_may_change(tmp_path):
    batch, model = tokens(), adapted(tiny_bert(), "model", router_input="embeddings")
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    for name in ("default", "branches", "mola", "weight"):
        loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "model", adapter_name=name).eval()
        assert torch.equal(outputs(loaded, batch), expected)
        loaded.save_pretrained(tmp_path / "again")
        subfolder = "" if name == "default" else name
        twice = PeftModel.from_pretrained(tiny_bert(), tmp_path / "again" / subfolder).eval()
        assert torch.equal(outputs(twice, batch), expected)


# ---- several adapters ----


def two_adapters():
    """`default` of variant grad beside `routed` with a router."""
    model = adapted(tiny_vit(), variant="grad")
    torch.manual_seed(3)
    model.add_adapter("routed", MolaConfig(num_experts=2, r=4, init_weights=False))
    return model.eval()


def test_adapters_are_loaded_beside_each_other_and_switched(tmp_path):
    batch, expected = pictures(), {}
    for name, fields in {"grad": {"variant": "grad"}, "routed": {"num_experts": 5}}.items():
        model = adapted(tiny_vit(), **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        expected[name] = outputs(model, batch)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "grad", adapter_name="grad").eval()
    model.load_adapter(tmp_path / "routed", adapter_name="routed")
    model.eval()
    assert torch.equal(outputs(model, batch), expected["grad"]), "a loaded adapter is not active before it is set"
    for name in ("routed", "grad", "routed"):
        model.set_adapter(name)
        assert torch.equal(outputs(model, batch), expected[name])
        assert mola_routing(model).needs_task_ids == (name == "grad")
        assert mola_routing(model).decorrelates == (name == "routed")
    assert not any("grad" in name.split(".") for name in trainable(model))


def test_only_the_active_adapter_trains():
    model = two_adapters()
    for active, other in (("default", "routed"), ("routed", "default"), ("default", "routed")):
        model.set_adapter(active)
        names = trainable(model)
        assert names and not any(other in name.split(".") for name in names)
        assert any("mola_router" in name for name in names) == (active == "routed")


def test_a_deleted_adapter_leaves_nothing_behind():
    model, batch = two_adapters(), pictures()
    model.set_adapter("routed")
    assert any(isinstance(module, Router) for module in model.modules())
    model.delete_adapter("routed")
    assert not any(isinstance(module, Router) for module in model.modules())
    assert not any("routed" in name for name in model.state_dict())
    routing = mola_routing(model)
    assert set(routing.mola_config) == {"default"} and routing.active_adapters == ["default"]
    assert torch.equal(outputs(model, batch), outputs(adapted(tiny_vit(), variant="grad"), batch))
    model.add_adapter("routed", MolaConfig(num_experts=4))
    model.set_adapter("routed")
    model(**batch)
    assert model.routing_weights()["model"].shape == (4, 4)


def test_a_deleted_adapter_forgets_its_fixed_task():
    model = two_adapters()
    model.base_model.set_task(1, "default")
    model.set_adapter("routed")
    model.delete_adapter("default")
    model.add_adapter("default", MolaConfig(variant="grad", num_experts=3))
    model.set_adapter("default")
    assert mola_routing(model).fixed_task == {}


@pytest.mark.parametrize("fields", VARIANTS)
def test_disabling_gives_the_outputs_of_the_base(fields):
    batch = clip_batch()
    base, _ = tiny_clip()
    plain = outputs(base, batch, None)
    model = adapted(base, **fields)
    expected = outputs(model, batch)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
        assert torch.equal(outputs(model, batch, None), plain)
        assert torch.equal(outputs(model.train(), batch, None), plain)
    assert torch.equal(outputs(model.eval(), batch), expected)
    assert trainable(model)


def test_status_reports_know_the_adapter():
    model = two_adapters()
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOLA", "routed": "MOLA"}
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.enabled is True and status.available_adapters == ["default", "routed"]
    assert status.requires_grad == {"default": True, "routed": False}
    layers = [layer for layer in model.get_layer_status() if layer.module_type != "Routing"]
    assert len(layers) == sum(isinstance(module, MolaLayer) for module in model.modules())
    model.set_task(1)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_what_only_lora_can_do_is_refused():
    model, batch = two_adapters(), pictures()
    with pytest.raises(ValueError, match="MoLA does not support adapter_names.*variant='grad' and task_ids"):
        model(**batch, adapter_names=["default", "routed", "default", "__base__"])
    with pytest.raises(NotImplementedError, match="does not support add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default", "routed"], [0.5, 0.5], "both")
    model(**batch, task_ids=TASKS)


# ---- choosing layers ----


def adapted_names(model):
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, MolaLayer)]


@pytest.mark.parametrize(
    ("make", "count"), [(tiny_bert, 13), (tiny_vit, 12), (tiny_resnet, 8), (lambda: tiny_clip()[0], 24)]
)
def test_default_targets(make, count):
    assert len(adapted_names(adapted(make(), variant="grad"))) == count


def test_an_architecture_without_default_targets_says_what_to_do():
    with pytest.raises(ValueError, match="target_modules"):
        adapted(tiny_regnet(), variant="grad")


def test_layers_to_transform():
    model = adapted(tiny_bert(), variant="grad", target_modules=["query", "value"], layers_to_transform=[1])
    assert adapted_names(model) == [f"encoder.layer.1.attention.self.{name}" for name in ("query", "value")]
    model = adapted(
        tiny_bert(), variant="grad", target_modules=["query"], layers_to_transform=0, layers_pattern="layer"
    )
    assert adapted_names(model) == ["encoder.layer.0.attention.self.query"]
    model = adapted(tiny_bert(), variant="grad", exclude_modules=["query", "pooler.dense"])
    assert len(adapted_names(model)) == 10 and not any("query" in name for name in adapted_names(model))


def test_all_linear_leaves_the_router_alone():
    model = adapted(tiny_bert_classifier(), target_modules="all-linear")
    assert len(adapted_names(model)) == 14
    model.add_adapter("second", MolaConfig(num_experts=2, target_modules="all-linear"))
    assert len(adapted_names(model)) == 14
    assert not any(isinstance(module, MolaLayer) for module in mola_routing(model).modules())


@pytest.mark.parametrize("bias", ["none", "all", "mola_only"])
def test_biases(bias, tmp_path):
    model, batch = adapted(tiny_bert(), variant="grad", target_modules=["query"], bias=bias), tokens()
    biases = {name for name in trainable(model) if name.endswith("bias")}
    expected = {
        "none": set(),
        "all": {name for name, _ in model.named_parameters() if name.endswith("bias")},
        "mola_only": {name for name, _ in model.named_parameters() if "query" in name and name.endswith("bias")},
    }
    assert biases == expected[bias]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in biases:
                parameter.add_(0.3)
    expected_outputs = outputs(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), expected_outputs)


@pytest.mark.parametrize("module", ["pooler", "word_embeddings"])
def test_modules_to_save_are_trained_saved_and_looked_at_by_the_router(module, tmp_path):
    model, batch = adapted(tiny_bert().double(), target_modules=["query"], modules_to_save=[module]), tokens()
    assert any("modules_to_save" in name for name in trainable(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(-1.5)
    with torch.no_grad():
        found = model(**batch)
    weights = model.routing_weights()["model"]
    router = mola_routing(model).mola_router["default"].branches["model"]
    table = model.base_model.model.get_input_embeddings()
    mask = batch["attention_mask"][:, :, None]
    pooled = (table(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
    assert (router(pooled).softmax(1) - weights).abs().max() < 1e-10
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert().double(), tmp_path).eval()
    with torch.no_grad():
        again = loaded(**batch)
    assert torch.equal(again.last_hidden_state, found.last_hidden_state)
    assert torch.equal(again.pooler_output, found.pooler_output)
    assert torch.equal(loaded.routing_weights()["model"], weights)


def test_a_saved_module_around_the_input_layer_is_looked_into(tmp_path):
    model, batch = adapted(tiny_clip()[0], router_input="embeddings", modules_to_save=["embeddings"]), clip_batch()
    with torch.no_grad():
        before = outputs(model, batch)
        weights = model.routing_weights()
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and "position" not in name:
                parameter.mul_(-2)
    expected = outputs(model, batch)
    assert not torch.allclose(expected, before)
    for tower, other in model.routing_weights().items():
        assert not torch.allclose(weights[tower], other)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip()[0], tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), expected)
    # An adapter beside it that saves no modules looks at those of the base.
    torch.manual_seed(1)
    second = MolaConfig(num_experts=3, r=2, init_weights=False, router_input="embeddings")
    loaded.add_adapter("second", second)
    loaded.set_adapter("second")
    found = outputs(loaded.eval(), batch)
    loaded.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    alone = PeftModel.from_pretrained(tiny_clip()[0], tmp_path / "both" / "second").eval()
    assert torch.equal(found, outputs(alone, batch))
    loaded.set_adapter("default")
    assert torch.equal(outputs(loaded, batch), expected)


def test_the_router_looks_at_the_input_layer_before_its_own_adapter():
    base = tiny_vit().double()
    batch = pictures(dtype=torch.float64)
    patches = base.embeddings.patch_embeddings.projection(batch["pixel_values"])
    model = adapted(base, router_input="embeddings", target_modules=["projection", "q_proj"])
    outputs(model, batch)
    router = mola_routing(model).mola_router["default"].branches["model"]
    expected = router(patches.flatten(2).mean(2)).softmax(1)
    assert (model.routing_weights()["model"] - expected).abs().max() < 1e-10


# ---- precision ----


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("fields", VARIANTS)
def test_a_base_in_bfloat16(fields, autocast):
    base, _ = tiny_clip()
    batch = clip_batch()
    exact = outputs(adapted(tiny_clip()[0], **fields), batch)
    torch.manual_seed(7)
    config = MolaConfig(num_experts=3, r=2, init_weights=False, **fields)
    model = get_peft_model(base.to(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "mola_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    found = outputs(model.eval(), batch)
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.6
    model.train()(**batch, task_ids=TASKS).logits_per_image.float().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "projection" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_autocast_computes_in_bfloat16_and_trains():
    model, batch = adapted(tiny_vit(), router_input="pixels").train(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch).last_hidden_state
        loss = found.float().square().mean() + mola_routing(model).decorrelation_loss(TASKS)
    loss.backward()
    assert model.routing_weights()["model"].dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
