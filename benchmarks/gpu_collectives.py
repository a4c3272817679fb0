"""Part of `benchmarks/gpu.py` in a process of its own: the exchanges of hf_dissect in a process group of one.

A run of one process exchanges nothing. Here, the group exists (NCCL on a GPU, gloo on the CPU), and `Ranks` is made to
use it, so that its collectives are called with tensors of the device, and must return what was sent. The ring of the
sigmoid loss sends nothing: it has no next process.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from gpu_run import MadePictures, Run
from peer_steps import make_model

from hf_dissect import OnlineSelector, distributed
from hf_dissect.distributed import Ranks
from hf_dissect.losses.sigmoid_ring import sigmoid_ring_loss
from hf_dissect.selection import LoopHooks

ROWS = 64


class GroupOfOne(Ranks):
    """`Ranks` that exchange by the process group although there is one process."""

    @property
    def alone(self) -> bool:
        """False: the exchange is what is tested."""
        return False


def measure(run: Run) -> dict[str, Any]:
    """Start a process with a process group of one, and return what it found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        script = Path(__file__).with_name("gpu.py")
        command = [sys.executable, str(script), "--in-process-group", "--output", str(output)]
        command += ["--tiny"] if run.tiny else []
        if run.tiny:
            environment["ACCELERATE_USE_CPU"] = "true"
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(finished.stderr[-1500:])
        return json.loads(output.read_text())


def run_in_process_group(run: Run, output: Path) -> None:
    """Call every exchange, check what it returns, and write the milliseconds of each."""
    accelerator = Accelerator(cpu=run.tiny)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if run.tiny else "nccl")
    results: dict[str, Any] = {"backend": dist.get_backend(), "world_size": dist.get_world_size(), "ms": {}}
    ranks = GroupOfOne(accelerator)
    values = torch.randn(ROWS, 16, device=run.device)
    columns = {"sample_id": torch.arange(ROWS), "kept": torch.rand(ROWS) > 0.5, "score": torch.rand(ROWS)}

    def with_gradient() -> bool:
        leaf = values.clone().requires_grad_()
        gathered = distributed._GatherWithGrad.apply(leaf)
        gathered.square().sum().backward()
        return torch.equal(gathered, values) and torch.allclose(leaf.grad, 2 * values)

    def by_columns() -> bool:
        found = ranks.gather_columns({name: column.to(run.device) for name, column in columns.items()}, [ROWS])
        return all(torch.equal(found[name], columns[name]) for name in columns)

    def around_the_ring() -> bool:
        unit = torch.nn.functional.normalize(values, dim=1)
        scale, bias = torch.tensor(10.0, device=run.device), torch.tensor(-10.0, device=run.device)
        return bool(torch.isfinite(sigmoid_ring_loss(unit, unit, scale, bias, None, None, 2**20)))

    checks = {
        "gather": lambda: torch.equal(ranks.gather(values), values.cpu()),
        "gather_numbers": lambda: ranks.gather_numbers(3, 4).tolist() == [[3, 4]],
        "gather_rows": lambda: torch.equal(ranks.gather_rows(values, [ROWS]), values),
        "gather_columns": by_columns,
        "send_rows": lambda: torch.equal(ranks.send_rows(values, [ROWS], [ROWS]), values),
        "gather_objects": lambda: ranks.gather_objects({"a": 1}) == [{"a": 1}],
        "wait": lambda: ranks.wait() is None,
        "gather with gradient": with_gradient,
        "sigmoid ring": around_the_ring,
    }
    for name, check in checks.items():
        check()  # the first call opens connections
        start = time.perf_counter()
        right = check()
        run.wait()
        results["ms"][name] = round(1000 * (time.perf_counter() - start), 3)
        if not right:
            raise RuntimeError(f"{name} did not return what was sent")
    results["global scope"] = _compare_scopes(run, ranks)
    output.write_text(json.dumps(results))
    dist.destroy_process_group()


def _compare_scopes(run: Run, ranks: Ranks) -> dict[str, Any]:
    """Select from the same candidates with local and global scope: one process keeps the same pairs in both."""
    size = run.name_size("small")
    model, pictures = make_model(size).to(run.device), MadePictures(run, size)
    kept, seconds = {}, {}
    for scope in ("local", "global"):
        hooks = replace(LoopHooks(), autocast=run.autocast)
        selector = OnlineSelector("small_loss", 0.5, num_samples=ROWS, scope=scope, ranks=ranks, hooks=hooks)
        selector.begin_epoch(0)
        for _ in range(2):
            batch = {**pictures.take(list(range(ROWS))), "sample_id": torch.arange(ROWS)}
            start = time.perf_counter()
            chosen = selector.select(model, batch)["sample_id"]
            run.wait()
            seconds[scope] = time.perf_counter() - start
        kept[scope] = sorted(chosen.tolist())
    if kept["local"] != kept["global"]:
        raise RuntimeError("local and global scope of one process keep different pairs")
    return {f"{scope}_ms": round(1000 * value, 3) for scope, value in seconds.items()} | {"same_pairs": True}
