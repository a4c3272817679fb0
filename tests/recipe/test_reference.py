"""The reference model in a recipe: required, refused, kept for the strategies of a comparison that read it."""

import pytest
from testing.tiny_recipe import tiny_recipe, tiny_settings

from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.recipe import Recipe, RecipeError
from hf_dissect.runs.before_training import list_hub_needs
from hf_dissect.selection import STRATEGIES
from hf_dissect.selection.options import WITH_REFERENCE

HUB_ID = "somebody/clip"


def test_the_strategies_that_need_one_are_the_same_in_recipe_and_code():
    assert set(WITH_REFERENCE) == {name for name, strategy in STRATEGIES.items() if strategy.reference}


@pytest.mark.parametrize("strategy", WITH_REFERENCE)
def test_a_missing_reference_is_named(strategy):
    with pytest.raises(RecipeError, match=f"selection.reference: null leaves {strategy} nothing to compare with"):
        Recipe.from_dict(tiny_settings(selection={"strategy": strategy}))


def test_a_reference_that_nothing_reads_is_refused():
    selection = {"strategy": "random", "reference": HUB_ID}
    with pytest.raises(RecipeError, match="selection.reference: 'somebody/clip' would not be read: random compares"):
        Recipe.from_dict(tiny_settings(selection=selection))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"history": "average", "variant": "momentum"}, "selection.options.variant: 'momentum' averages scores"),
        ({"snapshot_every": 5}, "selection.options.snapshot_every: 5 has no effect with history: ledger"),
        ({"history": "mean"}, "selection.options.history: 'mean' is not allowed; allowed: ledger, average, snapshot"),
    ],
)
def test_options_of_the_history_that_do_not_fit(options, fault):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(tiny_settings(selection={"options": options}))
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(fault)


def test_a_history_by_the_model_needs_no_warm_up_of_epochs(tmp_path):
    selection = {"options": {"history": "average", "model_warmup_steps": 2}, "warmup_epochs": 0}
    assert tiny_recipe(tmp_path, selection=selection).selection.warmup_epochs == 0
    tiny_recipe(tmp_path, selection=selection | {"warmup_epochs": 9})


def test_a_coreset_of_a_stream_and_one_of_too_few_pairs(tmp_path):
    coreset = {"strategy": "coreset", "reference": HUB_ID}
    streamed = {"source": "webdataset", "path": "shards", "streaming": True, "noise_rate": 0.0}
    with pytest.raises(RecipeError, match="data.streaming: true does not go with selection.strategy coreset"):
        tiny_recipe(tmp_path, selection=coreset, data=streamed, training={"max_steps": 3})
    with pytest.raises(RecipeError, match="selection.ratio: 0.05 of .* keeps"):
        tiny_recipe(tmp_path, selection=coreset | {"ratio": 0.05})


def test_in_a_comparison_each_strategy_gets_what_it_reads(tmp_path):
    recipe = tiny_recipe(tmp_path, selection={"reference": HUB_ID}, compare={"strategies": ["none", "rho"]})
    assert recipe.training_arguments()["selection_reference"] is None  # dissect itself
    assert recipe.with_strategy("none").selection.reference is None
    jest = recipe.with_strategy("jest")
    assert jest.selection.reference == HUB_ID and jest.training_arguments()["selection_reference"] == HUB_ID
    with pytest.raises(RecipeError, match="selection.reference: null leaves jest"):
        tiny_recipe(tmp_path).with_strategy("jest")


def test_the_reference_is_looked_for_on_the_hub_and_not_published_if_local(tmp_path):
    recipe = tiny_recipe(tmp_path, selection={"strategy": "rho", "reference": HUB_ID})
    assert ("selection.reference", HUB_ID) in [(need.key, need.name) for need in list_hub_needs(recipe)]
    shared, left_out = select_shareable(recipe.to_dict())
    assert shared["selection"]["reference"] == HUB_ID and "selection.reference" not in left_out
    (tmp_path / "model").mkdir()
    local = tiny_recipe(tmp_path, selection={"strategy": "rho", "reference": str(tmp_path / "model")})
    shared, left_out = select_shareable(local.to_dict())
    assert shared["selection"]["reference"] is None and "selection.reference" in left_out
