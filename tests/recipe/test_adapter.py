"""The section `adapter` of a recipe: what is allowed in it, and what is told when something else stands there."""

import subprocess
import sys

import pytest

from hf_dissect.recipe.recipe import Recipe, RecipeError

MOLA = {"type": "mola", "variant": "grad", "num_experts": 3}


def settings(adapter, **sections) -> dict:
    return {"name": "small", "model": {"config": {"model_type": "clip"}}, "adapter": adapter, **sections}


def faults_of(adapter, **sections) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(settings(adapter, **sections), "here.yaml")
    return caught.value.faults


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        {"type": "lora", "r": 4, "target_modules": ["q_proj"], "lora_dropout": 0, "rank_pattern": {"fc1": 2}},
        {
            "type": "lora",
            "target_modules": "all-linear",
            "layer_replication": [[0, 2]],
            "init_lora_weights": "gaussian",
        },
        {"type": "ia3", "target_modules": ["fc1"], "feedforward_modules": ["fc1"]},
        {"type": "mola"},
        {"type": "mola", "train_base": "all", "exclude_modules": ["fc1"], "router_input": "embeddings", "alpha": 8},
    ],
)
def test_a_sound_section_is_kept_as_it_is_written(adapter, tmp_path):
    recipe = Recipe.from_dict(settings(adapter))
    assert recipe.adapter == adapter and recipe.to_dict()["adapter"] == adapter
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("adapter", "fault"),
    [
        (5, "adapter: 5 is not allowed; allowed: a mapping of settings, or null for no adapter"),
        ({}, "adapter.type: missing; allowed: "),
        ({"type": "mole"}, "adapter.type: 'mole' is not allowed; allowed: adalora, "),
        ({"type": "mole"}, "did you mean 'mola'?"),
        ({"type": ["mola"]}, "adapter.type: ['mola'] is not allowed"),
        ({"type": "prompt_tuning"}, "adapter.type: 'prompt_tuning' is not allowed"),
        ({"type": "mola", "experts": 3}, "adapter.experts: unknown key (value 3); allowed: variant, num_experts, "),
        ({"type": "lora", "variant": "grad"}, "adapter.variant: unknown key (value 'grad'); allowed: r, "),
        ({"type": "mola", "r": "8"}, "adapter.r: '8' is not allowed; allowed: an integer"),
        ({"type": "mola", "r": 0}, "adapter: r=0: must be an integer of 1 or more."),
        ({"type": "mola", "variant": "moe"}, "adapter: variant='moe': must be one of 'router', 'grad'."),
        ({"type": "mola", "num_experts": 0}, "adapter: num_experts=0: must be"),
        (
            {"type": "mola", "train_base": "some"},
            "adapter: train_base='some': must be False, True, 'targets' or 'all'",
        ),
        ({"type": "mola", "alpha": float("nan")}, "adapter.alpha: nan is not allowed; allowed: a finite number"),
        ({"type": "lora", "bias": "some"}, "adapter.bias: 'some' is not allowed; allowed: none or all or lora_only"),
        (
            {"type": "lora", "inference_mode": True},
            "adapter.inference_mode: is set by the run (value True); leave it out",
        ),
        ({"type": "lora", "peft_type": "MOLA"}, "adapter.peft_type: is set by the run"),
        (
            {"type": "lora", "layers_pattern": "layers"},
            "adapter: When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
        ),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed(adapter, fault):
    assert any(fault in found for found in faults_of(adapter)), faults_of(adapter)


def test_all_faults_are_told_at_once():
    found = faults_of({"type": "lora", "r": "x", "alpha": 3}, data={"source": "nowhere"})
    assert [fault.partition(":")[0] for fault in found] == ["adapter.r", "adapter.alpha", "data.source"]


def test_experts_by_task_need_a_column_of_tasks():
    assert faults_of(MOLA) == [
        "data.task_column: missing; adapter.variant grad trains an expert for each task and needs the column that "
        "tells it"
    ]
    for sound in ({**MOLA, "default_task": 0}, {**MOLA, "variant": "router"}):
        assert Recipe.from_dict(settings(sound)).adapter == sound
    assert Recipe.from_dict(settings(MOLA, data={"task_column": "task"})).data.task_column == "task"


def test_settings_are_changed_one_by_one():
    recipe = Recipe.load("mola-router", ["adapter.num_experts=2", "adapter.r=4"])
    assert (recipe.adapter["num_experts"], recipe.adapter["r"]) == (2, 4)
    assert recipe.with_overrides(["adapter=null"]).adapter is None
    added = Recipe.load("quickstart", ["adapter.type=lora", "adapter.target_modules=all-linear"])
    assert added.adapter == {"type": "lora", "target_modules": "all-linear"}
    with pytest.raises(RecipeError, match="adapter.type: missing"):
        Recipe.load("quickstart", ["adapter.r=4"])


def test_the_shipped_recipes_for_tasks_differ_in_the_variant_only():
    router, grad = Recipe.load("mola-router"), Recipe.load("mola-grad")
    assert (router.adapter["variant"], grad.adapter["variant"]) == ("router", "grad")
    for recipe in (router, grad):
        assert recipe.data.task_column == "task" and recipe.data.scenes_tasks == recipe.adapter["num_experts"] == 4
        assert recipe.adapter["train_base"] == "all"
    assert router.to_dict()["training"] == grad.to_dict()["training"] and router.data == grad.data


def test_peft_is_imported_only_for_a_recipe_with_an_adapter():
    code = (
        "import sys; from hf_dissect.recipe.recipe import Recipe; Recipe.load('quickstart'); "
        "sys.exit('hf_dissect.models.adapters' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
