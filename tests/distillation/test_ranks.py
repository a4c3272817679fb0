"""Two processes train as one does on the rows of both."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from testing.distilling_ranks import SETTINGS, choose_and_train, columns, logged, train_and_resume
from testing.launched import on_ranks
from testing.tiny_modalities import tiny_columns, tiny_trainer, weights_of


def test_two_processes_train_as_one_on_the_rows_of_both(tmp_path):
    two = on_ranks([2], tmp_path, partial(train_and_resume, tmp_path))[2]
    one = tiny_trainer(tmp_path / "one", columns(), per_device_train_batch_size=8, **SETTINGS)
    one.train()
    assert torch.allclose(two["weights"], weights_of(one), atol=1e-5)
    for of_two, of_one in zip(two["logs"], logged(one), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3, abs=1e-4)
    of_one, of_two = dataclasses.asdict(one.measurement.measured["before"]), dataclasses.asdict(two["before"])
    assert of_one | {"seconds": 0} == pytest.approx(of_two | {"seconds": 0}, nan_ok=True)


def test_two_processes_choose_the_same_method(tmp_path):
    columns = {name: np.concatenate([values] * 4) for name, values in tiny_columns(40).items()}
    columns["subject"] = np.arange(160) // 4 % 8 + 1
    columns["action"] = np.where(np.arange(160) // 32 % 2 == 0, columns["action"].astype("<U1"), "")
    np.savez(tmp_path / "rows.npz", **columns)
    two = on_ranks([2], tmp_path, partial(choose_and_train, tmp_path / "run", tmp_path / "rows.npz"))[2]
    assert list(two["information"])[:1] == ["choice"] and two["information"]["choice"]["method"] == two["method"]
