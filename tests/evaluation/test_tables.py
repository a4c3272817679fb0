"""Tables and summaries as they are printed."""

import math

import numpy as np
import pytest

from hf_dissect.evaluation import format_results_table, retrieval_from_pairs, summarise_seeds
from hf_dissect.evaluation.tables import format_retrieval


def test_spread_is_the_sample_standard_deviation() -> None:
    runs = [{"R@1": 1.0, "strategy": "dissect", "times": {"total_s": 3.0}}, {"R@1": np.float32(2.0)}, {"R@1": 6}]
    # Mean 3; deviations -2, -1, 3; 14 / (3 - 1) = 7.
    assert summarise_seeds(runs) == {"R@1": {"mean": pytest.approx(3), "std": pytest.approx(math.sqrt(7))}}


def test_one_seed_has_no_spread() -> None:
    assert summarise_seeds([{"R@1": 4.0}]) == {"R@1": {"mean": 4.0, "std": None}}


def test_figures_that_no_run_or_one_run_could_compute() -> None:
    summary = summarise_seeds([{"auroc": None, "loss": 1.0}, {"auroc": None, "loss": None}])
    assert summary == {"auroc": {"mean": None, "std": None}, "loss": {"mean": 1.0, "std": None}}


def test_a_diverged_run_shows() -> None:
    summary = summarise_seeds([{"loss": 1.0}, {"loss": math.nan}])
    assert math.isnan(summary["loss"]["mean"]) and math.isnan(summary["loss"]["std"])


def test_no_runs_no_figures() -> None:
    assert summarise_seeds([]) == {}


def test_table_is_aligned() -> None:
    rows = [
        {"strategy": "none", "steps": 100, "recall_sum": {"mean": 9.5, "std": 0.25}, "auroc": None},
        {"strategy": "dissect:momentum", "steps": 100, "recall_sum": (101.126, None), "auroc": np.float32(0.5)},
        {"strategy": "random", "recall_sum": (7.0, 1.0), "auroc": math.nan},
    ]
    columns = {"strategy": "Strategy", "steps": "Steps", "recall_sum": "Recall sum", "auroc": "AUROC"}
    assert format_results_table(rows, columns, decimals={"auroc": 3}).split("\n") == [
        "Strategy          Steps   Recall sum  AUROC",
        "----------------  -----  -----------  -----",
        "none                100  9.50 ± 0.25      -",
        "dissect:momentum    100       101.13  0.500",
        "random                -  7.00 ± 1.00    nan",
    ]


def test_columns_by_key_and_no_rows() -> None:
    assert format_results_table([], ["a", "bc"]) == "a  bc\n-  --"
    assert format_results_table([{"a": {"mean": None, "std": None}}], ["a"]) == "a\n-\n-"


def test_repeated_captions_are_explained_below_the_figures() -> None:
    embeds, keys = np.eye(8), [0, 0, 0, 0, 4, 5, 6, 7]
    shown = format_retrieval(retrieval_from_pairs(embeds, embeds[keys], np.arange(8), keys))
    assert shown.split("\n\n")[-1] == (
        "4 captions are those of several images, for all of which they count as right. Where only a\n"
        "pair's own counts, no model can exceed an R@1 of 62.5 (image to text) and 62.5 (text to image)."
    )
    assert "captions" not in format_retrieval(retrieval_from_pairs(embeds, embeds, np.arange(8), np.arange(8)))
