import itertools

import pytest

from hf_dissect.training import time_spent
from hf_dissect.training.time_spent import TimeSpent


def test_time_of_an_inner_part_is_not_charged_to_the_outer(monkeypatch):
    # The clock advances by one second each time it is read.
    monkeypatch.setattr(time_spent.time, "perf_counter", itertools.count().__next__)
    times = TimeSpent()
    with times.measure("training"):  # read at 0 ...
        with times.measure("data"):  # 1 to 2
            pass
        with times.measure("scoring"):  # 3 to 6
            with times.measure("data"):  # 4 to 5
                pass
    # ... and at 7
    assert dict(times.seconds) == {"data": 2, "scoring": 2, "training": 3}
    assert times["evaluation"] == 0


def test_a_part_that_fails_is_charged_all_the_same(monkeypatch):
    monkeypatch.setattr(time_spent.time, "perf_counter", itertools.count().__next__)
    times = TimeSpent()
    with pytest.raises(RuntimeError), times.measure("data"):
        raise RuntimeError
    assert times["data"] == 1


def test_the_total_counts_what_is_under_way(monkeypatch):
    monkeypatch.setattr(time_spent.time, "perf_counter", itertools.count().__next__)
    times = TimeSpent()
    with times.measure("training"):  # from 0
        with times.measure("scoring"):  # 1 to 2
            pass
        assert times.total == 3
    assert times.total == 4 and times["scoring"] / times.total == 1 / 4
