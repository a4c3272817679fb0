"""Settings: their limits, told with the value that was given, and the way to a file and back."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from testing.tiny_bases import adapted, tiny_bert, tiny_resnet, tiny_vit, tokens

from hf_dissect.mola import MolaConfig

BAD = [
    ({"variant": "mixture"}, "variant='mixture': must be one of 'router', 'grad'"),
    ({"variant": None}, "variant=None: must be one of"),
    ({"num_experts": 0}, "num_experts=0: must be an integer of 1 or more"),
    ({"num_experts": 2.0}, "num_experts=2.0: must be an integer of 1 or more"),
    ({"num_experts": True}, "num_experts=True: must be an integer"),
    ({"r": 0}, "r=0: must be an integer of 1 or more"),
    ({"r": -4}, "r=-4: must be an integer"),
    ({"r": "8"}, "r='8': must be an integer"),
    ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0: must be an integer of 1 or more"),
    ({"alpha": 0}, "alpha=0: must be above 0"),
    ({"alpha": "16"}, "alpha='16': must be above 0"),
    ({"alpha": float("nan")}, "alpha=nan: must be above 0"),
    ({"alpha": float("inf")}, "alpha=inf: must be"),
    ({"alpha_pattern": {"key": -1}}, r"alpha_pattern\['key'\]=-1: must be above 0"),
    ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout=-0.1: must be in \[0, 1\)"),
    ({"dropout": "a lot"}, r"dropout='a lot': must be in \[0, 1\)"),
    ({"dropout": None}, r"dropout=None: must be in \[0, 1\)"),
    ({"bias": "some"}, "bias='some': must be 'none', 'all' or 'mola_only'"),
    ({"train_base": "some"}, "train_base='some': must be False, True, 'targets' or 'all'"),
    ({"train_base": 1}, "train_base=1: must be False, True"),
    ({"train_base": None}, "train_base=None: must be False, True"),
    ({"router_input": 3}, "router_input is a int; it must be 'pixels', 'embeddings' or the name"),
    ({"router_image_size": 0}, "router_image_size=0: must be an integer of 1 or more"),
    ({"router_architecture": "resnet18"}, "router_architecture='resnet18': must be 'resnet8' or 'resnet20'"),
    ({"router_architecture": ["resnet8"]}, r"router_architecture=\['resnet8'\]: must be 'resnet8' or 'resnet20'"),
    ({"decorrelation_weight": -1}, "decorrelation_weight=-1: must be 0 or more"),
    ({"decorrelation_weight": "0.1"}, "decorrelation_weight='0.1': must be 0 or more"),
    ({"decorrelation_weight": float("nan")}, "decorrelation_weight=nan: must be 0 or more"),
    ({"decorrelation_dim": 0}, "decorrelation_dim=0: must be an integer"),
    ({"decorrelation_temperature": 0}, "decorrelation_temperature=0: must be above 0"),
    ({"decorrelation_temperature": "1"}, "decorrelation_temperature='1': must be above 0"),
    ({"default_task": 4}, "default_task=4: must be a task from 0 to num_experts - 1 = 3, or None"),
    ({"default_task": -1}, "default_task=-1: must be a task"),
    ({"default_task": "photo"}, "default_task='photo': must be a task"),
    ({"default_task": True}, "default_task=True: must be a task"),
    ({"default_task": 1.0}, "default_task=1.0: must be a task"),
    ({"rank_pattern": ["query"]}, "rank_pattern"),
    ({"alpha_pattern": 3}, "alpha_pattern"),
    ({"target_modules": "query", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
    ({"layers_pattern": "layer"}, "`layers_to_transform` must also be specified"),
    ({"init_weights": "gaussian"}, "init_weights='gaussian'"),
    ({"train_logit_scale": "yes"}, "train_logit_scale='yes'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_value_that_is_not_allowed_is_refused(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MolaConfig(**fields)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="num_expert"):
        MolaConfig(num_expert=3)


def test_defaults_are_those_of_the_paper():
    config = MolaConfig()
    assert (config.variant, config.alpha, config.decorrelation_weight) == ("router", 16.0, 0.1)
    assert (config.decorrelation_dim, config.decorrelation_temperature, config.router_image_size) == (32, 1.0, 32)
    assert config.target_modules is None and config.train_base is False and config.task_type is None


def test_a_configuration_survives_its_file(tmp_path):
    config = MolaConfig(
        variant="grad",
        num_experts=5,
        r=3,
        alpha=2.5,
        rank_pattern={"query": 4},
        alpha_pattern={"key": 1.5},
        target_modules=["query", "key"],
        exclude_modules=["pooler"],
        layers_to_transform=[0, 1],
        default_task=4,
        train_base=True,
        router_image_size=None,
        train_logit_scale=True,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOLA" and written["target_modules"] in (["query", "key"], ["key", "query"])
    for found in (MolaConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(found) is MolaConfig and found.peft_type == "MOLA"
        assert found.to_dict() == config.to_dict() | {"inference_mode": found.inference_mode}


@pytest.mark.parametrize(
    ("patterns", "name", "rank"),
    [
        ({"query": 4}, "encoder.layer.0.attention.self.query", 4),
        ({"query": 4}, "encoder.layer.0.attention.self.my_query", 8),
        ({"query": 4}, "query", 4),
        ({"layer.1.attention.self.query": 4}, "encoder.layer.1.attention.self.query", 4),
        ({"layer.1.attention.self.query": 4}, "encoder.layer.11.attention.self.query", 8),
        ({r"layer\.[01]\..*": 4}, "encoder.layer.1.output.dense", 4),
        ({r"layer\.[01]\..*": 4}, "encoder.layer.2.output.dense", 8),
        ({"key|query": 2}, "encoder.layer.2.key", 2),
        ({"query": 4, "layer.0.query": 2}, "layer.0.query", 4),
    ],
)
def test_patterns_are_names_or_regular_expressions(patterns, name, rank):
    assert MolaConfig(rank_pattern=patterns).get_rank(name) == rank
    assert (
        MolaConfig(alpha_pattern={key: float(value) for key, value in patterns.items()}, alpha=8.0).get_alpha(name)
        == rank
    )


# ---- adapters that do not fit, files that are broken ----


@pytest.fixture
def folder(tmp_path):
    adapted(tiny_bert(), variant="grad").save_pretrained(tmp_path)
    return tmp_path


def test_an_adapter_of_more_layers_is_refused(folder):
    with pytest.raises(
        ValueError, match="does not fit this base model: its file has weights for layers that this base"
    ):
        PeftModel.from_pretrained(tiny_bert(num_hidden_layers=1), folder)


def test_an_adapter_of_fewer_layers_is_refused(folder):
    with pytest.raises(ValueError, match=r"does not fit.*has no weights for .*layer\.2.* and \d+ more.*unnamed model"):
        PeftModel.from_pretrained(tiny_bert(num_hidden_layers=3), folder)


def test_an_adapter_of_another_width_is_refused(folder):
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_bert(hidden_size=20), folder)


def test_an_adapter_of_another_architecture_is_refused(folder):
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        PeftModel.from_pretrained(tiny_resnet(), folder)
    with pytest.raises(ValueError, match="Target modules|does not fit"):
        PeftModel.from_pretrained(tiny_vit(), folder)


def test_a_file_without_some_weights_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    missing = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != missing}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for .*mola_A.*check that the file is complete"):
        PeftModel.from_pretrained(tiny_bert(), folder)


def test_a_file_without_its_router_is_refused(tmp_path):
    adapted(tiny_bert()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "mola_router" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for .*mola_router"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_a_truncated_file_is_refused(folder, length):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    message = rf"adapter_model.safetensors \({path.stat().st_size} bytes\) is truncated or not a safetensors file"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_bert(), folder)


def test_a_configuration_of_another_adapter_is_refused(folder):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"num_experts": 4}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_bert(), folder)
    path.write_text(json.dumps(settings | {"num_experts": "three"}))
    with pytest.raises(ValueError, match="num_experts='three': must be an integer"):
        PeftModel.from_pretrained(tiny_bert(), folder)


def test_a_base_that_refused_an_adapter_takes_another(folder):
    base = tiny_bert(num_hidden_layers=3)
    expected = base(**tokens()).last_hidden_state
    with pytest.raises(ValueError, match="target_modules|not found|no modules"):
        adapted(base, variant="grad", target_modules=["nothing_like_this"])
    assert torch.equal(base(**tokens()).last_hidden_state, expected)
    adapted(base, variant="grad")
