"""The report must show what a run did, whatever the run lacks, and let nothing of the user's data act as markup."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from testing.html_page import Page

from hf_dissect.report.plots import MAX_POINTS, histogram_problem, mean_series, series
from hf_dissect.report.selection import PairSample, RunSummary, write_report
from hf_dissect.report.tables import results_table

SCRIPT = "<script>alert(1)</script>"
PROBLEMS = [{"id": 17, "problem": "no such file", "path": "/data/17.jpg"}, {"id": 4711, "problem": "x", "path": None}]


def make_run(name="dissect", noise=True, samples=12):
    history = []
    for step in range(10, 101, 10):
        entry = {"loss": 5 - step / 50, "learning_rate": 1e-3, "step": step, "epoch": step / 50}
        if noise:
            entry |= {"selection_noise_kept": 0.4 - step / 500, "selection_noise_candidates": 0.4}
        history.append(entry | {"selection_correlation_kept": 20.0, "selection_correlation_dropped": 10.0})
        if step % 50 == 0:
            figures = {"eval_recall_sum": 1.0 + step, "eval_image_to_text_R@1": 2.0, "eval_image_to_text_R@10": 9.0}
            history.append({"eval_loss": 4 - step / 50, "step": step, "epoch": step / 50} | figures)
    image = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))
    pairs = [PairSample(i, f"caption {i} of {name}", 30.0 - i, 1.5, i % 2 == 0, image) for i in range(samples)]
    metrics = {
        "strategy": "dissect",
        "steps": 100,
        "num_pairs": 30000,
        "final": {"retrieval_r@1_image_to_text": 12.5, "recall_sum": 101.0},
        "selection": {"kept_share": 0.5, "noise_kept": 0.2 if noise else None},
        "times": {"total_s": 100.0, "data_s": 10.0, "scoring_s": 25.0, "training_s": 50.0, "evaluation_s": 5.0},
        "bad_rows": {"count": 2, "reasons": {"undecodable image": 2}, "ids": [17, 4711], "problems": PROBLEMS},
        "settings": {"selection": {"ratio": 0.5}, "training": {"seed": 0}},
        "versions": {"torch": "2.13.0"},
    }
    histogram = {"edges": [0.0, 10.0, 20.0, 30.0], "kept": [1, 5, 9], "dropped": [8, 5, 2]}
    return RunSummary(name, metrics, history, histogram, pairs, list(pairs))


def report(tmp_path, runs, **arguments):
    return Page(write_report(tmp_path / "report.html", runs, **{"title": "A title", **arguments}))


def test_page_holds_everything_and_is_well_formed(tmp_path):
    page = report(tmp_path, [make_run()])
    assert page.problems == [] and page.stack == []
    assert page.count("img") == 24
    # loss, evaluation loss; recall sum, image to text; mismatched; histogram, correlation
    assert sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in page.tags) == 7
    assert "17: no such file: /data/17.jpg" in page.text and "4711: x" in page.text
    for words in ("caption 11 of dissect", "30,000", "12.50", "25.0 s", "undecodable image: 2", "17, 4711", "2.13.0"):
        assert words in page.text
    assert page.text.count("✓ clean") == page.text.count("✗ mismatched") == 12
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)][:2] == ["h1", "h2"]


def test_repeated_captions_are_explained_once_and_are_not_columns(tmp_path):
    runs = [make_run("dissect"), make_run("random")]
    ceilings = {f"{side}_own_ceiling@{k}": 40.0 + k for side in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    for run in runs:
        run.metrics["final"] |= {"repeated_captions": 61, **ceilings}
    page = report(tmp_path, runs)
    assert page.text.count("61 captions are those of several images") == 1
    assert "can exceed an R@1 of 41.0 (image to text)" in page.text
    assert "eiling" not in page.text.replace("\n", " ").split("can exceed")[0]


def test_page_requests_nothing_from_outside(tmp_path):
    page = report(tmp_path, [make_run(), make_run("random")])
    links = [value for value in page.attributes("href", "src", "srcset", "xlink:href", "action", "data", "poster")]
    outside = {value for value in links if not value.startswith(("#", "data:image/jpeg;base64,"))}
    assert outside == {"https://arxiv.org/abs/2507.12998"}
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert "@import" not in page.style and "url(" not in page.style
    assert all(value.startswith("url(#") for value in page.attributes("clip-path"))


def test_ids_are_unique_and_references_resolve(tmp_path):
    page = report(tmp_path, [make_run(), make_run("random")])
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    wanted = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    wanted += [value[5:-1] for value in page.attributes("clip-path")] + page.attributes("aria-labelledby")
    assert set(wanted) <= set(ids)


def test_pictures_and_plots_have_alternative_texts_and_tables_have_headers(tmp_path):
    page = report(tmp_path, [make_run()])
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.tags if tag == "svg")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def test_nothing_of_the_user_becomes_markup(tmp_path):
    run = make_run(f"run {SCRIPT}")
    run.best_kept = [PairSample(f"1{SCRIPT}", f"{SCRIPT} \"quoted' $x_{{$ \ud800", 1.0)]
    run.metrics |= {
        "strategy": SCRIPT,
        "final": {f"metric{SCRIPT}": 1.0},
        "settings": {SCRIPT: {"path": SCRIPT}},
        "versions": {SCRIPT: SCRIPT},
        "bad_rows": {"count": 1, "reasons": {SCRIPT: 1}, "ids": [SCRIPT], "problems": [{"problem": SCRIPT}]},
    }
    table = [{"strategy": SCRIPT, "seeds": [0, 1], SCRIPT: {"mean": 1.0, "std": 0.1}}]
    for arguments in ({}, {"table": table}):
        page = report(tmp_path, [run, make_run(f"$\\frac {SCRIPT}")], title=f"T {SCRIPT}", **arguments)
        assert page.count("script") == 0 and page.problems == []
        assert page.text.count("alert(1)") >= 10
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


@pytest.mark.parametrize(
    "run",
    [
        RunSummary("bare", {}),
        RunSummary("nulls", dict.fromkeys(("final", "selection", "times", "bad_rows", "settings", "versions"))),
        RunSummary("absent", {}, None, None, None, None),
        RunSummary(
            "odd", {"times": {"total_s": None}, "final": {"recall_sum": None, "r@1": math.nan}}, [{}, {"loss": 1}]
        ),
        RunSummary(
            "not-numbers", {"times": {"total_s": math.nan}}, [{"loss": math.nan, "step": 1}, {"loss": "x", "step": 2}]
        ),
    ],
    ids=lambda run: run.name,
)
def test_missing_parts_are_said_not_raised(tmp_path, run):
    page = report(tmp_path, [run])
    assert page.problems == [] and page.count("img") == 0
    for words in (
        "No figures",
        "No loss was logged",
        "No evaluation was logged",
        "does not say which captions are mismatched",
        "No candidate was scored",
        "No times were recorded",
        "Settings were not recorded",
        "not recorded",
    ):
        assert words in page.text
    assert page.text.count("No pairs were recorded") == 2
    assert not {"nan", "None", "null", "inf"} & set(page.text.split())


def test_no_run_at_all(tmp_path):
    assert "No run was given" in report(tmp_path, []).text


def test_truth_unknown(tmp_path):
    run = make_run(noise=False)
    for sample in run.best_kept:
        sample.is_clean = None
    page = report(tmp_path, [run])
    assert "✓ clean" not in page.text and "does not say which captions are mismatched" in page.text


def test_nan_leaves_a_gap_and_a_dash(tmp_path):
    run = make_run()
    run.log_history[3]["loss"] = math.nan
    run.metrics["final"]["noise_detection_auroc"] = math.nan
    run.best_kept = [PairSample(1, "c", math.nan, math.inf)]
    page = report(tmp_path, [run])
    assert "correlation –" in page.text and "differential –" in page.text
    assert "AUROC" not in page.text
    # 5 - step / 50 at steps 10, 20, 30 and 50; 40 was logged as NaN.
    steps, values = series(run.log_history[:5], "loss")
    assert steps == [10.0, 20.0, 30.0, 50.0] and values == pytest.approx([4.8, 4.6, 4.4, 4.0])


def test_several_runs_are_overlaid_and_have_their_own_samples(tmp_path):
    runs = [make_run("none", noise=False), make_run("random"), make_run("dissect")]
    runs[0].worst_dropped = []
    path = write_report(tmp_path / "report.html", runs, title="t")
    page = Page(path)
    assert path.stat().st_size < 1_500_000
    assert page.count("img") == 12 + 24 + 24
    # Overlaid: 5 figures for all, and 2 for each run.
    assert sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in page.tags) == 5 + 3 * 2
    summaries = re.findall(r"<summary>(.*?)</summary>", path.read_text("utf-8"))
    assert summaries[:3] == ["none", "random", "dissect"]
    assert "Not drawn, since nothing was logged: none." in page.text
    colors = set(re.findall(r"var\(--c(\d)\)", path.read_text("utf-8")))
    assert colors == {"0", "1", "2"}


def test_seeds_share_a_colour_under_their_mean(tmp_path):
    runs = [make_run(f"{name}, seed {seed}") for name in ("random", "dissect") for seed in range(3)]
    path = write_report(tmp_path / "report.html", runs, title="t")
    assert set(re.findall(r"var\(--c(\d)\)", path.read_text("utf-8"))) == {"0", "1"}
    assert "mean of 3 seeds" in Page(path).text
    # At step 1 (2 + 4) / 2; step 2 was logged by one run only.
    assert mean_series([([1.0, 2.0], [2.0, 9.0]), ([1.0], [4.0])]) == ([1.0], [3.0])


def test_comparison_table_shows_mean_and_spread(tmp_path):
    table = [
        {"strategy": "random", "seeds": [0, 1, 2], "recall_sum": {"mean": 20.5, "std": 1.25}, "noise_kept": 0.4},
        {"strategy": "dissect", "seeds": [0, 1, 2], "recall_sum": {"mean": 31.0, "std": None}, "noise_kept": math.nan},
    ]
    page = report(tmp_path, [make_run()], table=table)
    assert "20.50 ± 1.25" in page.text and "40.0 %" in page.text and "dissect (3 seeds)" in page.text
    rows = results_table(
        [("a", {"recall_sum": 1.0, "total_s": 60}), ("b", {"recall_sum": 2.0, "total_s": 30})], corner=""
    )
    assert rows.columns == ["Recall sum", "Wall-clock"]
    assert [[cell.best for cell in row] for row in rows.rows] == [[False, False], [True, True]]


def test_long_histories_are_averaged_in_blocks(tmp_path):
    run = make_run()
    run.log_history = [{"loss": float(step % 2), "step": step} for step in range(1, 10 * MAX_POINTS + 1)]
    page = write_report(tmp_path / "report.html", [run], title="t").read_text("utf-8")
    # Blocks of 10 alternate between 0 and 1, so every mean is 0.5 and the curve is level: one height for all points.
    curve = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*var\(--c0\)', page))
    points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", curve)
    assert len(points) <= MAX_POINTS and len({height for _, height in points}) == 1


@pytest.mark.parametrize(
    ("histogram", "words"),
    [
        (None, "No candidate"),
        ({}, "No candidate"),
        ({"edges": [0, 1], "kept": [1, 2], "dropped": [1]}, "incomplete"),
        ({"edges": [0, math.nan], "kept": [1], "dropped": [1]}, "finite"),
        ({"edges": [1, 1], "kept": [1], "dropped": [1]}, "increase"),
        ({"edges": [0, 1], "kept": [0], "dropped": [0]}, "empty"),
    ],
)
def test_histogram_that_cannot_be_drawn_says_why(tmp_path, histogram, words):
    assert words in histogram_problem(histogram)
    assert histogram_problem({"edges": [0, 1], "kept": [0], "dropped": [3]}) is None
    run = make_run()
    run.score_histogram = histogram
    assert words in report(tmp_path, [run]).text


def test_save_and_load(tmp_path):
    run = make_run()
    run.best_kept[0] = PairSample(np.int64(2**40), "é\u2028\ud800", math.nan, None, np.bool_(True), None)
    run.metrics["final"]["x"] = np.float32(0.5)
    run.metrics["final"]["broken"] = math.inf
    assert (
        RunSummary.load(RunSummary("absent", {}, None, None, None, None).save(tmp_path / "absent.json")).best_kept
        == []
    )
    path = run.save(tmp_path / "deep" / "report_data.json")
    json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    loaded = RunSummary.load(path)
    assert loaded.name == run.name and loaded.log_history == run.log_history
    assert loaded.score_histogram == run.score_histogram
    assert loaded.metrics == run.metrics | {"final": run.metrics["final"] | {"x": 0.5, "broken": None}}
    first, second = loaded.best_kept[:2]
    assert first.sample_id == 2**40 and first.caption == "é\u2028\ud800" and first.is_clean is True
    assert math.isnan(first.correlation) and first.differential is None and first.image is None
    assert (second.caption, second.correlation, second.is_clean) == ("caption 1 of dissect", 29.0, False)
    assert second.image.size == (32, 24)
    assert report(tmp_path, [loaded]).count("img") == 23
    assert [file.name for file in path.parent.iterdir()] == ["report_data.json"]


def test_same_run_gives_the_same_file_and_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    pages = [write_report(tmp_path / f"{i}.html", [make_run()], title="t").read_text("utf-8") for i in range(2)]
    assert pages[0] == pages[1] and dict(matplotlib.rcParams) == before


def test_import_is_light():
    heavy = "('torch', 'matplotlib', 'numpy')"
    code = f"import sys, hf_dissect.report.selection; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_short_run_shows_what_it_knows_without_a_log(tmp_path):
    run = make_run()
    run.log_history = []
    run.metrics["selection"] = {"kept_share": 0.5, "noise_kept": 0.25, "noise_candidates": 0.4}
    page = report(tmp_path, [run])
    assert "Not known" not in page.text and "No curve: the run ended before its first log" in page.text
    assert "25.0 % of the kept, 40.0 % of the candidates" in page.text
    assert "Mismatched among candidates40.0 %" in page.text  # among the facts at the top
    run.metrics["selection"] = {"kept_share": 0.5}
    assert "Not known: the data does not say which captions are mismatched" in report(tmp_path, [run]).text


def test_figures_of_a_sample_are_named_as_such(tmp_path):
    run = make_run()
    assert "random sample of the training pairs" not in report(tmp_path, [run]).text
    run.metrics |= {"scored_train_pairs": 10_000, "num_pairs": 29_000}
    assert f"{run.name}: 10,000 of 29,000" in report(tmp_path, [run]).text
