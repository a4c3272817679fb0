"""The picture of a run: a PNG that shows what was logged, and words that say so."""

import pytest
from PIL import Image

from hf_dissect.report.picture import draw_run

LOG = [
    {"step": 2, "loss": 3.0, "selection_noise_kept": 0.5, "selection_noise_candidates": 0.4},
    {"step": 4, "loss": 2.5, "selection_noise_kept": 0.125, "selection_noise_candidates": 0.4},
    {"step": 4, "eval_loss": 2.75, "eval_recall_sum": 123.0},
]
HISTOGRAM = {"edges": [0, 50, 100], "kept": [1, 2], "dropped": [2, 1]}


def colors_of(path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return {color for _, color in picture.convert("RGB").getcolors(1 << 24)}


def test_what_was_logged_is_drawn_and_told(tmp_path):
    told = draw_run(tmp_path / "x.png", LOG, HISTOGRAM)
    assert told == (
        "Curves of the run over optimiser steps: loss (training ends at 2.5, evaluation ends at 2.75); recall sum of "
        "the evaluations (recall sum ends at 123); mismatched pairs (among the kept ends at 12.5%, among the "
        "candidates ends at 40.0%); candidates of the last epoch by correlation."
    )
    assert {(0, 131, 95), (0, 114, 178), (213, 94, 0)} <= colors_of(tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_what_was_not_logged_is_left_out(tmp_path):
    assert draw_run(tmp_path / "x.png", LOG[:1]).count(";") == 1
    assert (213, 94, 0) not in colors_of(tmp_path / "x.png")
    assert draw_run(tmp_path / "y.png", [], HISTOGRAM).endswith("candidates of the last epoch by correlation.")


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": float("nan")}], [{"loss": 1.0}]])
def test_without_anything_to_draw_there_is_no_file(tmp_path, log):
    assert draw_run(tmp_path / "x.png", log) is None and not (tmp_path / "x.png").exists()


def test_the_same_run_gives_the_same_file(tmp_path):
    for name in "ab":
        draw_run(tmp_path / name, LOG * 300, HISTOGRAM)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
