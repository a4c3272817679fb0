"""Runs functions in other processes, alone or in several that talk by gloo."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from testing.drawing import leave_out_drawing

# Imported once, in a process that has no threads and of which the ranks are forks. Start it with PYTHONPATH set
# (conftest.py), as it is what the server finds modules by.
multiprocessing.set_forkserver_preload(
    [
        *("testing.two_ranks", "testing.distilling_ranks", "testing.cached_steps", "testing.faulty_run"),
        *(
            "testing.averaging_ranks",
            "testing.balanced_ranks",
            "testing.planned_ranks",
            "testing.reference_ranks",
            "testing.expert_ranks",
            "testing.ledger_ranks",
        ),
        "testing.sized_ranks",
    ]
)


def exit_code_of(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a process of its own and return how that ended; negative: the number of a signal."""
    process = multiprocessing.get_context("forkserver").Process(target=_run_alone, args=(function, arguments))
    process.start()
    process.join()
    return process.exitcode


def _run_alone(function: Callable[..., Any], arguments: tuple) -> None:
    _prepare()
    function(*arguments)


def _prepare() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    leave_out_drawing()


def on_ranks(world_sizes: list[int], folder: Path, function: Callable[[], Any]) -> dict[int, Any]:
    """Call a function in as many processes as each of `world_sizes` says; return what the first of them did, by size.

    Their environment is that of processes started by torchrun. An error in any of them is raised here; they all give
    up when one has waited a minute for another.
    """
    arguments = (world_sizes, folder, function)
    torch.multiprocessing.start_processes(_run, arguments, nprocs=max(world_sizes), start_method="forkserver")
    return {size: torch.load(folder / f"result-{size}.pt", weights_only=False) for size in world_sizes}


def _run(rank: int, world_sizes: list[int], folder: Path, function: Callable[[], Any]) -> None:
    _prepare()
    for size in world_sizes:
        if rank >= size:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # never used: the processes meet in a file
        store = f"file://{folder}/store-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=1))
        returned = function()
        if rank == 0:
            torch.save(returned, folder / f"result-{size}.pt")
        if dist.is_initialized():  # the command leaves the group at its end
            dist.barrier()
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
