"""Sizes of pictures and dropped patches that do not fit the rest of a recipe are refused before anything is loaded."""

import pytest
from testing.tiny_recipe import tiny_settings

from hf_dissect.recipe.recipe import Recipe, RecipeError

RHO = {"strategy": "rho", "reference": "user/model"}
REPAIR = {"selection": {"strategy": "none"}, "objective": {"repair": {"encoder": "user/it"}, "noisy_channel": {}}}
SMALL = {"strategy": "none", "scoring_image_size": 16}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"image_size": {0.5: 32}}}, "data.image_size: .*the first share is 0"),
        ({"data": {"image_size": "large"}}, "data.image_size: 'large' is not allowed; allowed: a side in pixels"),
        ({"data": {"image_size": 0}}, "data.image_size: 0 is not allowed; allowed: at least 1"),
        ({"data": {"image_size": {0: 16, 1.5: 32}}}, r"data.image_size: 1.5: 32 is not allowed; the share is in"),
        ({"model": {"patch_dropout": 1.0}}, r"model.patch_dropout: 1.0 is not allowed"),
        ({"model": {"patch_dropout": 0.5, "freeze": "vision"}}, "model.patch_dropout: 0.5 drops nothing in a frozen"),
        ({"data": {"image_size": 16}, "selection": RHO}, "data.image_size: 16 .*reference 'user/model'"),
        ({**REPAIR, "data": {"image_size": 16}}, "data.image_size: 16 does not go with encoder 'user/it'"),
        ({**REPAIR, "selection": SMALL}, "selection.scoring_image_size: 16 does not go with encoder 'user/it'"),
        ({"selection": {"scoring_exposure": 0.5}}, "selection.scoring_exposure: 0.5 has no size to train on"),
        ({"selection": {"scoring_image_size": 16, "rescore_every": 8}}, "selection.scoring_image_size: .*every 8"),
        ({"selection": {"scoring_patch_dropout": 0.5, **RHO}}, "selection.scoring_patch_dropout: 0.5 .*'user/model'"),
    ],
)
def test_a_recipe_says_what_does_not_fit(sections, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(tiny_settings(**sections))


def test_what_fits_is_kept():
    sections = {
        "model": {"patch_dropout": 0.5},
        "data": {"image_size": {0: 16, 0.5: 32}},
        "selection": {"scoring_image_size": 16, "scoring_exposure": 0.5},
    }
    recipe = Recipe.from_dict(tiny_settings(**sections))
    arguments = recipe.training_arguments()
    assert arguments["image_size"] == {0: 16, 0.5: 32} and arguments["patch_dropout"] == 0.5
    assert arguments["scoring_image_size"] == 16 and arguments["scoring_exposure"] == 0.5
    changed = recipe.with_overrides(["data.image_size={0: 16, 0.75: 32}", "model.patch_dropout=0"])
    assert changed.data.image_size == {0: 16, 0.75: 32}
    Recipe.from_dict(tiny_settings(**{**REPAIR, "selection": {**SMALL, "scoring_exposure": 0}}))
    assert recipe.with_strategy("none").selection.scoring_image_size == 16
