"""Recipes that an earlier version saved keep their meaning."""

import pytest

from hf_dissect.distillation import METHODS, DistillationRecipe
from hf_dissect.distillation.earlier_versions import TERM_WEIGHTS, restore_earlier_settings
from hf_dissect.distillation.terms import TASK_TERMS, TERMS

SAVED = {
    "name": "run",
    "student": {"column": "depth", "config": {"model_type": "sequence_encoder"}},
    "auxiliaries": {"skeleton": {"config": {"model_type": "sequence_encoder"}}},
    "data": {
        **{"source": "npz", "path": "arrays.npz", "group_column": "subject", "train_groups": [1]},
        **{"train_split": "train", "validation_split": "validation", "test_split": "test"},
        **{"max_train_rows": None, "max_eval_rows": None, "max_bad_fraction": 0.01, "num_workers": 0},
    },
    "distillation": {"method": "amid"},
}


@pytest.mark.parametrize("method", sorted({*METHODS} - {"student"}))
def test_a_saved_recipe_of_an_earlier_version_has_its_weights(method):
    recipe = DistillationRecipe.from_dict(SAVED | {"distillation": {"method": method}})
    weights = vars(recipe.distillation.weights)
    assert {name: weights[name] for name in TERMS if name not in TASK_TERMS} == TERM_WEIGHTS[method]
    assert weights["teacher_task"] == weights["auxiliary_task"] == 1
    assert not recipe.distillation.compares_auxiliaries and not recipe.distillation.standardise_compared


def test_what_the_run_said_itself_is_kept():
    given = {"method": "amid", "term_weights": {"information_student": 1.5}, "memory_bank": 8}
    recipe = DistillationRecipe.from_dict(SAVED | {"distillation": given})
    assert recipe.distillation.weights.information_student == 1.5 and recipe.distillation.memory_bank == 8
    assert recipe.distillation.weights.hinton == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_today_is_left_alone(method, tmp_path):
    short = {name: value for name, value in SAVED["data"].items() if name != "num_workers"}
    settings = SAVED | {"data": short, "distillation": {"method": method}}
    assert restore_earlier_settings(settings) is settings
    recipe = DistillationRecipe.from_dict(settings)
    assert recipe.distillation.weights == METHODS[method]
    recipe.save(tmp_path / "recipe.yaml")
    assert DistillationRecipe.load(tmp_path / "recipe.yaml") == recipe, "a run of this version says its settings"


@pytest.mark.parametrize("section", [None, "amid", {"method": "amid", "term_weights": "all"}])
def test_what_cannot_be_read_is_left_to_the_checks(section):
    settings = SAVED | {"distillation": section}
    assert restore_earlier_settings(settings) is settings
