import numpy as np
import pytest
import torch

from hf_dissect.selection.monitor import NUM_EXTREMES, SelectionMonitor

IDS = torch.tensor([10, 11, 12, 13])
KEPT = torch.tensor([True, False, True, False])
CORRELATION = torch.tensor([20.0, 30.0, 40.0, 60.0])
CLEAN = torch.tensor([True, True, False, False])


def test_figures_are_means_over_all_candidates_since_the_last_log():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, KEPT, CORRELATION, None, CLEAN)
    monitor.observe(0, IDS[:1], torch.tensor([True]), torch.tensor([80.0]), None, torch.tensor([False]))
    expected = {
        "selection_kept_share": 3 / 5,
        "selection_correlation_kept": (20 + 40 + 80) / 3,
        "selection_correlation_dropped": (30 + 60) / 2,
        "selection_noise_kept": 2 / 3,
        "selection_noise_candidates": 3 / 5,
    }
    assert monitor.pop_logs() == pytest.approx(expected)
    assert monitor.pop_logs() == {}
    monitor.observe(1, IDS, KEPT, CORRELATION, None, CLEAN)
    assert monitor.pop_logs()["selection_correlation_kept"] == (20 + 40) / 2


def test_the_run_and_the_last_epoch_have_figures_of_their_own():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, ~KEPT, CORRELATION, None, CLEAN)
    monitor.observe(1, IDS, KEPT, CORRELATION, None, CLEAN)
    monitor.pop_logs()
    assert monitor.last_epoch.epoch == 1
    assert monitor.last_epoch.sums.figures()["correlation_kept"] == (20 + 40) / 2
    assert monitor.run.figures()["correlation_kept"] == (20 + 40 + 30 + 60) / 4
    assert monitor.run.figures()["kept_share"] == 4 / 8


def test_what_is_unknown_has_no_figure():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, KEPT)
    assert monitor.pop_logs() == {"selection_kept_share": 0.5}
    assert monitor.score_histogram() is None and monitor.ranking_truth() is None
    assert monitor.last_epoch.best_kept == [] and monitor.last_epoch.worst_dropped == []
    monitor.observe(0, IDS, torch.ones(4, dtype=torch.bool), CORRELATION)
    assert monitor.pop_logs() == {"selection_kept_share": 1.0, "selection_correlation_kept": 150 / 4}
    assert SelectionMonitor().pop_logs() == {}


def test_unscored_steps_do_not_dilute_the_mean_correlation():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, KEPT)
    monitor.observe(0, IDS, KEPT, CORRELATION)
    assert monitor.pop_logs()["selection_correlation_kept"] == (20 + 40) / 2


def test_the_histogram_counts_every_candidate_of_the_last_epoch():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, KEPT, CORRELATION)
    correlation = torch.tensor([0.0, 1.9, 2.0, 99.9, 100.0, 100.00001])
    kept = torch.tensor([True, True, False, False, True, True])
    monitor.observe(1, torch.arange(6), kept, correlation)
    histogram = monitor.score_histogram()
    assert histogram["edges"] == [2.0 * i for i in range(51)]
    assert {i: count for i, count in enumerate(histogram["kept"]) if count} == {0: 2, 49: 2}
    assert {i: count for i, count in enumerate(histogram["dropped"]) if count} == {1: 1, 49: 1}


@pytest.mark.parametrize("ranked", [True, False])
def test_the_extremes_are_the_best_kept_and_the_worst_dropped_of_the_last_epoch(ranked):
    generator = np.random.default_rng(0)
    monitor, seen = SelectionMonitor(), []
    for epoch in (0, 1):
        seen.clear()
        for step in range(5):
            ids = torch.arange(20) + 100 * step + 1000 * epoch
            correlation = torch.from_numpy(generator.uniform(0, 100, 20).astype(np.float32))
            priority = torch.from_numpy(generator.normal(size=20).astype(np.float32))
            kept = torch.from_numpy(generator.random(20) < 0.5)
            clean = torch.from_numpy(generator.random(20) < 0.5)
            monitor.observe(epoch, ids, kept, correlation, priority if ranked else None, clean)
            rank = priority if ranked else correlation
            seen += zip(*(part.tolist() for part in (rank, ids, correlation, kept, clean)), strict=True)
    best = sorted((pair for pair in seen if pair[3]), reverse=True)[:NUM_EXTREMES]
    worst = sorted(pair for pair in seen if not pair[3])[:NUM_EXTREMES]
    for observed, expected in ((monitor.last_epoch.best_kept, best), (monitor.last_epoch.worst_dropped, worst)):
        found = [(pair.priority, pair.sample_id, pair.correlation, pair.is_clean) for pair in observed]
        assert found == [(rank, key, correlation, clean) for rank, key, correlation, _, clean in expected]


def test_truths_are_kept_beside_the_priorities_of_the_last_epoch():
    monitor = SelectionMonitor()
    for epoch, shift in ((0, 0.0), (1, 1.0), (1, 2.0)):
        monitor.observe(epoch, IDS, KEPT, CORRELATION, CORRELATION / 100 + shift, CLEAN)
    priority, truth = monitor.ranking_truth()
    assert priority == pytest.approx([1.2, 1.3, 1.4, 1.6, 2.2, 2.3, 2.4, 2.6])
    assert truth.tolist() == CLEAN.tolist() * 2


def test_a_batch_without_kept_or_dropped_pairs_is_fine():
    monitor = SelectionMonitor()
    monitor.observe(0, IDS, torch.zeros(4, dtype=torch.bool), CORRELATION, None, CLEAN)
    assert monitor.pop_logs() == {"selection_kept_share": 0.0, "selection_correlation_dropped": 150 / 4}
    assert len(monitor.last_epoch.worst_dropped) == 4 and not monitor.last_epoch.best_kept
