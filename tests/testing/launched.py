"""Runs a function in several real processes that talk by gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in a process that has no threads and of which the ranks are forks.
multiprocessing.set_forkserver_preload(["torch", "transformers", "hf_dissect.losses", "testing.tiny_models"])


def on_ranks(world_sizes: list[int], folder: Path, function: Callable[[], Any]) -> dict[int, Any]:
    """Call a function in as many processes as each of `world_sizes` says; what the first of them returned, by size.

    An error in any of them is raised here; they all give up when one has waited a minute for another.
    """
    arguments = (world_sizes, folder, function)
    torch.multiprocessing.start_processes(_run, arguments, nprocs=max(world_sizes), start_method="forkserver")
    return {size: torch.load(folder / f"result-{size}.pt", weights_only=False) for size in world_sizes}


def _run(rank: int, world_sizes: list[int], folder: Path, function: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    for size in world_sizes:
        if rank >= size:
            continue
        store = f"file://{folder}/store-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=1))
        returned = function()
        if rank == 0:
            torch.save(returned, folder / f"result-{size}.pt")
        dist.barrier()
        dist.destroy_process_group()
