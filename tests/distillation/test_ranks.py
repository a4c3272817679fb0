"""Two processes train as one does on the rows of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing.distilling_ranks import SETTINGS, columns, logged
from testing.tiny_modalities import tiny_trainer, weights_of

ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_on_the_rows_of_both(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "testing" / "distilling_ranks.py"), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = tiny_trainer(tmp_path / "one", columns(), per_device_train_batch_size=8, **SETTINGS)
    one.train()
    assert torch.allclose(two["weights"], weights_of(one), atol=1e-5)
    for of_two, of_one in zip(two["logs"], logged(one), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3, abs=1e-4)
