"""What processes tell each other: nothing when alone, and the truth when there are two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_dissect.ranks import Ranks

ROOT = Path(__file__).parents[1]


def test_alone_everything_stays_as_it_is():
    ranks = Ranks(Accelerator(cpu=True))
    assert ranks.alone and ranks.smallest(3) == 3
    values = torch.tensor([3.0, 1.0])
    assert torch.equal(ranks.gather(values), values) and torch.equal(ranks.gather_ragged(values), values)


def test_two_processes_train_compare_and_agree(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }
    finished = subprocess.run(
        [*launch, str(ROOT / "tests" / "two_ranks.py"), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    # One comparison in one folder, told and written once.
    lines = finished.stdout.splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[1/2] none", "[2/2] dissect"]
    assert len([line for line in lines if line.startswith("report ")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("trainer", "router", "grad"),
        *("compared", "tiny-0.yaml", "tiny-1.yaml"),
    }
    metrics = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    assert [run["steps"] for run in metrics["runs"]] == [2, 2] and len(metrics["table"]) == 2
    alone = json.loads((tmp_path / "trainer" / "metrics.json").read_text())
    assert (
        alone["steps"] == 12 and alone["bad_rows"]["ids"] == [7] and (tmp_path / "trainer" / "report.html").is_file()
    )
