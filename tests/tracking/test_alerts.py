"""Alerts come where a run should be looked at, once for each reason, and never by chance."""

import math

import numpy as np
import pytest
import torch
from testing import faulty_run

from hf_dissect.cards.privacy import leave_out_places
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.tracking.alerts import Alert, AlertLog, find_gradient_not_finite, find_skipped_rows
from hf_dissect.tracking.selection_alerts import find_strange_estimate, find_wrong_preference


def observe(shift: float, truth: bool = False, count: int = 1000, seed: int = 0) -> SelectionMonitor:
    """A monitor of as many kept as dropped pairs, whose kept ones score higher by `shift` standard deviations."""
    random = np.random.default_rng(seed)
    kept = torch.arange(count) % 2 == 0
    scores = torch.tensor(50 + 5 * random.standard_normal(count) + 5 * shift * kept.numpy(), dtype=torch.float32)
    clean = torch.tensor(random.random(count) < 0.7)
    priority = scores if not truth else torch.tensor(random.standard_normal(count) + shift * clean.numpy())
    monitor = SelectionMonitor()
    monitor.observe(0, torch.arange(count), kept, scores, priority, clean if truth else None)
    return monitor


@pytest.mark.parametrize(
    ("strategy", "shift", "truth", "progress", "found"),
    [
        ("small_loss", -1.0, False, 0.2, True),
        ("small_loss", -1.0, False, 0.05, False),  # too early
        ("small_loss", 1.0, False, 1.0, False),
        ("small_loss", 0.0, False, 1.0, False),
        ("dissect", -1.0, False, 0.4, False),  # as it is at first
        ("dissect", -1.0, False, 0.6, True),
        ("big_loss", -1.0, False, 1.0, False),  # looks for such pairs
        ("random", -1.0, False, 1.0, False),
        ("big_loss", -1.0, True, 1.0, True),  # the truth decides
        ("small_loss", 1.0, True, 1.0, False),
        ("small_loss", -1.0, True, 0.4, False),
    ],
)
def test_a_rule_that_prefers_the_wrong_pairs(strategy, shift, truth, progress, found):
    alerts = find_wrong_preference(strategy, observe(shift, truth), progress)
    assert [alert.subject for alert in alerts] == ["preference"] * found


@pytest.mark.parametrize("truth", [True, False])
def test_chance_is_not_an_alert(truth):
    for seed in range(100):
        assert find_wrong_preference("small_loss", observe(0.0, truth, count=400, seed=seed), 1.0) == []
    assert find_wrong_preference("small_loss", observe(-3.0, truth, count=40), 1.0) == []  # too few to say
    assert find_wrong_preference("small_loss", SelectionMonitor(), 1.0) == []
    constant = SelectionMonitor()
    constant.observe(0, torch.arange(400), torch.arange(400) < 200, torch.full((400,), 50.0))
    assert find_wrong_preference("small_loss", constant, 1.0) == []


def log_estimates(*mismatched: float, every: int = 50) -> list[dict]:
    return [
        {"step": every * number, "selection_estimated_mismatched": value} for number, value in enumerate(mismatched, 1)
    ]


@pytest.mark.parametrize(
    ("mismatched", "title"),
    [
        ([0.5, 0.4, 0.3, 0.25, *[0.2] * 20], None),
        ([0.5, 0.4, 0.3, 0.25, *[0.2] * 20, 0.39], None),
        ([0.5, 0.4, 0.3, 0.25, *[0.2] * 20, 0.41], "pi has left its past"),
        ([0.5, 0.4, 0.3, 0.45, *[0.4] * 20, 0.2], "pi has left its past"),
        ([0.5, 0.4, 0.3, 0.25, *[0.2] * 5, 0.9], None),  # hardly any past
        ([0.5, 0.9], None),  # it begins at 1/2
        ([0.5, 0.7, 0.9, 0.95], "pi is at its bound"),
        ([0.5, 0.1, 0.01, 0.001], "pi is at its bound"),
        ([0.5, 0.1, 0.01, 0.002], None),
        ([0.5, 0.7, 0.9, math.nan], None),
        ([], None),
    ],
)
def test_an_estimate_that_cannot_be_right(mismatched, title):
    assert [alert.title for alert in find_strange_estimate(log_estimates(*mismatched))] == ([title] if title else [])


def test_more_skipped_rows_than_half_of_the_limit():
    assert find_skipped_rows(5, 100, 0.1, "x") == [] and find_skipped_rows(0, 0, 0.1, "x") == []
    (alert,) = find_skipped_rows(6, 100, 0.1, "x")
    assert "6 of 100 rows cannot be used (6.00%); the run ends above 10.00% (x)" in alert.text
    rows = BadRows(0.1)  # a stream, which is judged from 1,000 rows on
    reasons = torch.zeros(500, dtype=torch.int8)
    reasons[:30] = 1
    rows.add(torch.arange(500), reasons)
    assert rows.count_judged() == (0, 0)
    rows.add(torch.arange(500, 1000), reasons)
    assert rows.count_judged() == (60, 1000) and find_skipped_rows(*rows.count_judged(), 0.1, "x")
    assert BadRows(0.1, 64).count_judged() == (0, 64)


@pytest.mark.parametrize(
    ("norm", "half", "count"),
    [(1.0, False, 0), (math.nan, False, 1), (math.inf, False, 1), (math.inf, True, 0), ("x", 0, 0)],
)
def test_a_gradient_that_is_not_finite(norm, half, count):
    assert len(find_gradient_not_finite({"grad_norm": norm}, half)) == count


def test_each_reason_is_said_once_and_not_again_after_a_resume(caplog):
    log, alert = AlertLog(), Alert("a", "Title", "Text.")
    assert log.add([alert, Alert("b", "Other", "Text.", warned=True)], 5) and log.add([alert], 6) == []
    assert [record.message for record in caplog.records] == ["Step 5: Title. Text."]
    resumed = AlertLog()
    resumed.load_state_dict(log.state_dict())
    assert resumed.add([alert], 9) == [] and resumed.describe() == {"alerts": log.raised}
    assert AlertLog().describe() == {}


def test_alerts_of_a_run_are_in_its_log_its_metrics_and_its_report(tmp_path, caplog):
    trainer = faulty_run.make_trainer(tmp_path, bad_row=True, max_bad_fraction=0.02)
    trainer.train()
    metrics = trainer.finish()
    assert [(entry["subject"], entry["step"]) for entry in metrics["alerts"]] == [("skipped_rows", 4)]
    assert sum("Many rows are skipped" in record.message for record in caplog.records) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="warning"') == 1 and "Step 4: Many rows are skipped. 1 of 64 rows cannot be used" in page
    resumed = faulty_run.make_trainer(tmp_path, bad_row=True, max_bad_fraction=0.02)
    resumed.train(str(tmp_path / "checkpoint-9"))
    assert resumed.observer.alerts.raised == metrics["alerts"]
    quiet = faulty_run.make_trainer(tmp_path / "quiet")
    quiet.train()
    assert "alerts" not in quiet.finish() and 'class="warning"' not in (tmp_path / "quiet" / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a dog\n on  grass", "a dog\n on  grass"),
        ("see https://x.example/a?b and (/home/ada/x.jpg), then", "see [left out] and [left out] then"),
        ("token hf_abcdefghijkl here", "token [left out] here"),
        ("black/white and/or 3/4", "black/white and/or 3/4"),
        ("", ""),
    ],
)
def test_places_and_tokens_are_left_out(text, left):
    assert leave_out_places(text) == left
