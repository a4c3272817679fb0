"""Points the test-suite of PEFT at MoLA: a pytest plugin that replaces the methods PEFT's tests are run for.

`make peft-suite` runs it. Every parametrised test that PEFT runs for its own methods runs for the cases below instead,
through PEFT's own test code. What is about one particular method of PEFT is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from peft import BOFTConfig, HRAConfig

from hf_dissect import MolaConfig

Cases = list[Any]

ROUTER = {"variant": "router", "router_input": "embeddings", "num_experts": 3}
GRAD = {"variant": "grad", "num_experts": 3, "default_task": 0}


@dataclass
class MolaGradConfig(MolaConfig):
    """For tests that are given a class and no settings of the method; the tests train without task ids."""

    variant: str = "grad"
    default_task: int | None = 0


CLASSES = [MolaConfig, MolaGradConfig]

# Name, model of PEFT's tests, settings.
CUSTOM_MODELS = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5 modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP 6 rank, alpha, dropout", "MLP", {"target_modules": ["lin0"], "r": 4, "alpha": 4.0, "dropout": 0.1}),
    ("MLP 7 all-linear", "MLP", {"target_modules": "all-linear"}),
    ("MLP 8 exclude_modules", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    (
        "MLP 9 patterns",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin1": 4.0}},
    ),
    ("MLP 10 no decorrelation", "MLP", {"target_modules": ["lin0"], "decorrelation_weight": 0.0}),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + transformers Conv1D 2", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("Embedding + transformers Conv1D 3", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d Groups2", "Conv2dGroups2", {"target_modules": ["conv2d"]}),
    # These two deal the numbers of nine samples out to a batch of another size, so that there is no sample to route.
    ("Conv2d 3", "Conv2d2", {"target_modules": ["conv2d"], "variant": "grad"}),
    ("Conv2d Groups", "Conv2dGroups", {"target_modules": ["conv2d"], "variant": "grad"}),
]
TEST_CASES = [
    (f"{name} MoLA {settings['variant']}", model_id, MolaConfig, settings | kwargs)
    for settings in (ROUTER, GRAD)
    for name, model_id, kwargs in CUSTOM_MODELS
    if kwargs.get("variant") in (None, settings["variant"])
]
MULTIPLE_ACTIVE_ADAPTERS = [
    (
        f"MoLA {settings['variant']} {name}",
        "mola",
        MolaConfig,
        settings | {"target_modules": ["lin0"], "init_weights": False},
        settings | {"target_modules": [second], "init_weights": False, "r": rank},
    )
    for settings in (ROUTER, GRAD)
    for name, second, rank in (("Same", "lin0", 8), ("Different", "lin1", 8), ("Same, other rank", "lin0", 4))
]
CONFIGS = [
    (MolaConfig, {}),
    (MolaConfig, GRAD),
    (MolaConfig, ROUTER | {"rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin1": 4.0}, "train_base": "targets"}),
]

# Test module -> layers of all its models, as the tests combine every case with every model.
TARGETS_OF_MODULE = {
    "test_feature_extraction_models": ["query", "value", "in_proj", "query_proj", "value_proj"],
    "test_seq_classifier": ["query", "value", "q_proj", "v_proj"],
    "test_token_classification_qa": ["query", "value"],
    "test_encoder_decoder_models": ["q", "v", "q_proj", "v_proj"],
    "test_decoder_models": ["q_proj", "v_proj", "c_attn"],
    "test_quantization": ["q_proj", "v_proj"],
}
IMAGES = {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]}
IMAGE_CONFIGS = [
    pytest.param(
        MolaConfig(**ROUTER | {"router_input": "pixels"}, **IMAGES),
        marks=pytest.mark.xfail(
            raises=AssertionError,
            strict=True,
            reason="The last line counts the batch norms and expects those of modules_to_save only; the pixel router "
            "has some of its own. All that comes before passes.",
        ),
    ),
    MolaConfig(**ROUTER, **IMAGES),
    MolaConfig(**GRAD, **IMAGES),
]

# Names of the arguments in a test's `parametrize` -> what it is run for.
CASES: dict[str, Cases] = {
    "test_name, model_id, config_cls, config_kwargs": TEST_CASES,
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": MULTIPLE_ACTIVE_ADAPTERS,
    "config_class, mandatory_kwargs": CONFIGS,
    "config": IMAGE_CONFIGS,
    # Of the tests with torch.compile; the second member is for the compiler.
    "settings": [
        (MolaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **settings), {})
        for settings in (ROUTER, GRAD)
    ],
}
# The projection learns from the decorrelation loss, of which this test knows nothing.
CASES_OF_TEST: dict[str, Cases] = {
    "test_only_params_are_updated": [
        (*names, config_cls, kwargs | {"decorrelation_weight": 0.0}) for *names, config_cls, kwargs in TEST_CASES
    ]
}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the cases before pytest makes tests of them."""
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize" and (cases := _cases(metafunc.function, *mark.args)) is not None:
            marks[i] = pytest.mark.parametrize(mark.args[0], cases).mark


def _cases(test: Callable, argnames: str, values: Any) -> Cases | None:
    if argnames in CASES and not (argnames == "settings" and "compile" not in test.__name__):
        return CASES_OF_TEST.get(test.__name__, CASES[argnames])
    values = list(values)
    if argnames == "config_cls,config_kwargs" and any(config_cls is BOFTConfig for config_cls, _ in values):
        settings = {
            "task_type": values[0][1].get("task_type"),
            "target_modules": TARGETS_OF_MODULE[test.__module__.rpartition(".")[2]],
        }
        cases = [(MolaConfig, ROUTER | settings), (MolaConfig, GRAD | settings)]
        # That test merges without asking whether the method can, as the others do.
        return cases[1:] if test.__name__ == "test_merge_unmerge_unload" else cases
    if HRAConfig in values:  # a list within the test: what is expected of HRA is expected of MoLA
        return CLASSES
    if any(isinstance(value, HRAConfig) for value in values):
        return [MolaConfig(**settings, target_modules=["lin0"], init_weights=False) for settings in (ROUTER, GRAD)]
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is still run for a method of PEFT."""
    config.hook.pytest_deselected(items=[item for item in items if not _is_about_mola(item)])
    items[:] = filter(_is_about_mola, items)


def _is_about_mola(item: pytest.Item) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else []
    values = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return any(
        isinstance(value, MolaConfig) or (isinstance(value, type) and issubclass(value, MolaConfig))
        for value in values
    )


@pytest.fixture(autouse=True)
def _as_for_other_methods(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (request.module, sys.modules.get(f"{request.module.__package__}.testing_common")):
        for own in (_skip_if_merging_not_supported, _skip_if_conv1d_not_supported):
            if hasattr(module, own.__name__):
                monkeypatch.setattr(module, own.__name__, own)


def _skip_if_merging_not_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    """PEFT's tests call the function of this name before they merge; it skips them for Lily and others that cannot."""
    if config_kwargs.get("variant", "router") == "router":
        pytest.skip("A router's weights depend on the input and cannot be merged; MoLA raises a ValueError.")


def _skip_if_conv1d_not_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    """Skip nothing: MoLA adapts the `Conv1D` of transformers, unlike most methods."""
