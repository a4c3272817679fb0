"""Two processes train as one does on the rows of both."""

from functools import partial

import pytest
import torch
from testing.distilling_ranks import SETTINGS, columns, logged, train_and_resume
from testing.launched import on_ranks
from testing.tiny_modalities import tiny_trainer, weights_of


def test_two_processes_train_as_one_on_the_rows_of_both(tmp_path):
    two = on_ranks([2], tmp_path, partial(train_and_resume, tmp_path))[2]
    one = tiny_trainer(tmp_path / "one", columns(), per_device_train_batch_size=8, **SETTINGS)
    one.train()
    assert torch.allclose(two["weights"], weights_of(one), atol=1e-5)
    for of_two, of_one in zip(two["logs"], logged(one), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3, abs=1e-4)
