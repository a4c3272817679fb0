"""A comparison must give every rule the same data, steps and start, and its table must follow from its runs."""

import json
import statistics

import pytest
from safetensors.torch import load_file
from testing.tiny_recipe import tiny_recipe
from torch import equal

from hf_dissect.recipe.recipe import Recipe, RecipeError
from hf_dissect.runs.compare import compare, format_comparison

ALL = ["none", "random", "big_loss", "small_loss", "clipscore", "dissect", "dissect:momentum"]


def test_all_strategies_in_one_table_and_one_report(tmp_path):
    announced = []
    comparison = compare(tiny_recipe(tmp_path), ALL, [3], announce=announced.append)
    assert announced == [f"[{number}/7] {name}" for number, name in enumerate(ALL, 1)]
    assert json.loads((tmp_path / "metrics.json").read_text()) == comparison
    assert comparison["name"] == "tiny" and [row["strategy"] for row in comparison["table"]] == ALL
    assert len({(run["steps"], run["num_pairs"], run["seed"]) for run in comparison["runs"]}) == 1
    assert {run["selection"]["noise_candidates"] for run in comparison["runs"]} == {0.25}
    report = (tmp_path / "report.html").read_text()
    assert all(name in report for name in ALL)
    for name in ALL:
        own = json.loads((tmp_path / f"{name.replace(':', '-')}-seed3" / "metrics.json").read_text())
        assert own in comparison["runs"]


def test_the_table_is_mean_and_deviation_over_seeds(tmp_path):
    comparison = compare(tiny_recipe(tmp_path), ["random", "none"], [0, 1])
    # Run after run: random with seed 0, none with seed 0, random with seed 1, none with seed 1.
    for row, runs in zip(comparison["table"], (comparison["runs"][::2], comparison["runs"][1::2]), strict=True):
        assert [run["seed"] for run in runs] == row["seeds"] == [0, 1]
        sums = [run["final"]["recall_sum"] for run in runs]
        assert row["recall_sum"]["mean"] == pytest.approx(statistics.mean(sums))
        assert row["recall_sum"]["std"] == pytest.approx(statistics.stdev(sums))
        seconds = [sum(run["times"][f"{part}_s"] for part in ("data", "scoring", "training")) for run in runs]
        assert row["train_s"]["mean"] == pytest.approx(statistics.mean(seconds))
    assert len({run["final"]["loss"] for run in comparison["runs"]}) == 4


def test_the_table_shows_how_well_labels_separate(tmp_path):
    recipe = tiny_recipe(tmp_path, selection={"warmup_epochs": 1})
    rows = {row["strategy"]: row for row in compare(recipe, ["gsc", "ncr", "none"], [0])["table"]}
    metrics = [json.loads((tmp_path / f"{name}-seed0" / "metrics.json").read_text()) for name in ("gsc", "ncr")]
    assert rows["gsc"]["label_auroc"]["mean"] == metrics[0]["selection"]["label_auroc"]
    assert rows["ncr"]["label_auroc"]["mean"] == metrics[1]["selection"]["p_clean_auroc"]
    assert rows["none"]["label_auroc"]["mean"] is None
    assert "Label AUROC" in (tmp_path / "report.html").read_text()


def test_the_table_shows_the_share_that_a_run_estimates(tmp_path):
    recipe = tiny_recipe(tmp_path, training={"max_steps": 4})
    table = compare(recipe, ["noisy_channel", "none"], [0])["table"]
    metrics = json.loads((tmp_path / "noisy_channel-seed0" / "metrics.json").read_text())["selection"]
    assert table[0]["estimated_mismatched"]["mean"] == metrics["estimated_mismatched"] != 0.5
    assert table[0]["label_auroc"]["mean"] == metrics["evidence_auroc"]
    assert table[1]["estimated_mismatched"]["mean"] is None
    assert "mismatched, estimated" in format_comparison(table).splitlines()[0]
    assert "estimated" not in format_comparison(table[1:]).splitlines()[0]
    assert "Estimated mismatched" in (tmp_path / "report.html").read_text()


def test_the_start_is_that_of_the_seed_for_every_strategy(tmp_path):
    # Without a learning rate the weights at the end are those of the start.
    compare(tiny_recipe(tmp_path, training={"learning_rate": 0.0, "max_steps": 1}), ["none", "dissect"], [0, 1])
    end = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    for name, weight in end["none-seed0"].items():
        assert equal(weight, end["dissect-seed0"][name])
    assert not equal(end["none-seed0"]["text_projection.weight"], end["none-seed1"]["text_projection.weight"])


def test_the_recipes_own_comparison_is_saved_with_what_was_compared(tmp_path):
    short = {"training": {"max_steps": 1}, "compare": {"strategies": ["none", "random"], "seeds": [4]}}
    compare(tiny_recipe(tmp_path / "own", **short))
    compare(tiny_recipe(tmp_path / "other", **short), ["small_loss"], [5])
    own, other = (Recipe.load(tmp_path / name / "recipe.yaml").compare for name in ("own", "other"))
    assert (own.strategies, own.seeds) == (["none", "random"], [4])
    assert (other.strategies, other.seeds) == (["small_loss"], [5])
    # Its own recipe repeats one run of the comparison alone.
    alone = Recipe.load(tmp_path / "other" / "small_loss-seed5" / "recipe.yaml")
    assert alone.selection.strategy == "small_loss" and alone.training["seed"] == 5


@pytest.mark.parametrize(
    ("strategies", "seeds", "reason"),
    [
        (["none", "best"], [0], "'best' is not a strategy"),
        (["none", "none"], [0], "there twice"),
        ([], [0], "at least one of"),
        (["none"], [0, 0], "each seed once"),
        (["none"], ["0"], "an integer"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(strategies, seeds, reason, tmp_path):
    with pytest.raises(RecipeError, match=reason):
        compare(tiny_recipe(tmp_path / "new"), strategies, seeds)
    assert not (tmp_path / "new").exists()


def test_a_strategy_that_the_settings_rule_out_is_refused_before_anything_runs(tmp_path):
    recipe = tiny_recipe(tmp_path / "new", selection={"strategy": "none", "ratio": 0.1})
    with pytest.raises(RecipeError, match="contrastive loss needs 2"):
        compare(recipe, ["none", "random"], [0])
    assert not (tmp_path / "new").exists()


def test_an_interrupted_comparison_leaves_what_it_has(tmp_path):
    def announce(text):
        if text.startswith("[3/3]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(tiny_recipe(tmp_path, training={"max_steps": 1}), ["none", "random", "clipscore"], announce=announce)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["strategy"] for row in metrics["table"]] == ["none", "random"] and len(metrics["runs"]) == 2
    assert "random" in (tmp_path / "report.html").read_text()


def test_resume_takes_over_finished_runs_of_the_same_settings_only(tmp_path):
    recipe = tiny_recipe(tmp_path)
    first = compare(recipe, ["none", "random"], [0])
    announced = []
    second = compare(recipe, ["none", "random", "small_loss"], [0], resume=True, announce=announced.append)
    assert announced == ["[1/3] none: finished before", "[2/3] random: finished before", "[3/3] small_loss"]
    assert second["runs"][:2] == first["runs"] and [row["strategy"] for row in second["table"]][-1] == "small_loss"
    announced.clear()
    changed = recipe.with_overrides(["training.weight_decay=0.3"])
    compare(changed, ["none"], [0], resume=True, announce=announced.append)
    assert announced == ["[1/1] none"]


def test_strategies_with_a_reference_stand_next_to_others(tmp_path):
    compare(tiny_recipe(tmp_path / "first", training={"max_steps": 2}), ["none"], [0])
    reference = tmp_path / "first" / "none-seed0"
    names = ["none", "learnability", "rho", "jest", "coreset"]
    recipe = tiny_recipe(
        tmp_path / "all", selection={"reference": str(reference)}, compare={"strategies": names, "seeds": [0]}
    )
    comparison = compare(recipe)
    assert [row["strategy"] for row in comparison["table"]] == names
    assert len({run["steps"] for run in comparison["runs"]}) == 1  # a step of the coreset stands for a whole batch
    assert [run.get("reference") for run in comparison["runs"]] == [None, *["a local model"] * 4]
    shares = [run["selection"]["noise_kept"] for run in comparison["runs"]]
    assert shares[0] == 0.25 and all(0 <= share <= 1 for share in shares)
