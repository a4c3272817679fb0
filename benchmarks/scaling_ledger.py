"""Processor time and memory that a ledger takes in each of several processes, split over them or whole; measured.

Part of `scaling.py`. A step is that of dissect's momentum variant with the same number of candidates a process: the
history of the own candidates is read, and their scores are recorded in history and correlation. Ids are hashed, and
known before. Times are processor time of a process with all its threads, which those that share the cores do not
lengthen. Memory is what the ledger adds to a process (Linux).
"""

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from ledger import hashed_ids
from scaling_model import EXCHANGES

from hf_dissect.distributed import Ranks
from hf_dissect.selection import make_strategy
from hf_dissect.selection.ledger_access import make_access
from hf_dissect.selection.shard_group import plan_stages

COLUMNS = ("correlation", "history")
WARMUP_STEPS = 5


def resident_mib() -> float:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def work(rank: int, count: int, options: argparse.Namespace, shards: bool, place: str, results: Any) -> None:
    """One process of a measurement."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the processes meet in a file
    torch.set_num_threads(1)
    store = f"file://{place}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(minutes=5))
    ranks = Ranks(Accelerator(cpu=True))
    strategy = make_strategy("dissect", variant="momentum")
    before = resident_mib()
    access = make_access(None, COLUMNS, strategy, ranks, shards)
    for start in range(0, options.ledger_pairs, 2**18):
        ids = hashed_ids(torch.arange(start, min(start + 2**18, options.ledger_pairs)))
        for name in COLUMNS:
            access.ledger.write(name, ids, torch.zeros(len(ids)))
        del ids
    figures = {"memory_mib": resident_mib() - before, "own_pairs": len(access.ledger.own)}
    generator = torch.Generator().manual_seed(rank)
    batches = [
        hashed_ids(torch.randint(options.ledger_pairs, (options.ledger_batch,), generator=generator))
        for _ in range(WARMUP_STEPS + options.ledger_steps)
    ]

    def record(sample_id, columns, ledger) -> None:
        ledger.write("correlation", sample_id, columns["correlation"])
        strategy.record(sample_id, columns["correlation"], ledger)

    for step, ids in enumerate(batches):
        if step == WARMUP_STEPS:
            ranks.wait()
            begin = time.process_time()
        # What the loop exchanges before each step anyway brings the size of the packets along.
        route = access.plan(ids)
        split = int(ranks.gather_numbers(len(ids), 0 if route is None else route.fullest)[:, 1].max())
        access.fetch(ids, route, split)
        values = access.ledger.read("history", ids).nan_to_num(0) + 1
        access.record(
            {"sample_id": ids, "correlation": values}, [options.ledger_batch] * count, record, is_fetched=True
        )
        access.wait()
    figures["processor_ms"] = (time.process_time() - begin) / options.ledger_steps * 1000
    results.put(figures)
    ranks.wait()
    dist.destroy_process_group()


def measure(count: int, options: argparse.Namespace, shards: bool) -> dict[str, Any]:
    """Means over the processes of one measurement."""
    fork = multiprocessing.get_context("fork")  # of what is imported already
    results = fork.Queue()
    with tempfile.TemporaryDirectory() as place:
        arguments = [(rank, count, options, shards, place, results) for rank in range(count)]
        processes = [fork.Process(target=work, args=own) for own in arguments]
        for process in processes:
            process.start()
        found = [results.get(timeout=900) for _ in processes]
        for process in processes:
            process.join()
    means = {key: sum(each[key] for each in found) / count for key in found[0]}
    return {"processes": count, "ledger": "split" if shards and count > 1 else "whole", **means}


def fit_exchange(rows: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Least squares of the processor time of a split ledger: us for a stage of an exchange, and for a message."""
    points = [(plan_stages(row["processes"]), row["processor_ms"]) for row in rows if row["ledger"] == "split"]
    if len(points) < 3:
        return None, None
    known = [[1, EXCHANGES * len(stages), EXCHANGES * sum(size - 1 for size in stages)] for stages, _ in points]
    solved = torch.linalg.lstsq(
        torch.tensor(known, dtype=torch.float64), torch.tensor([[spent] for _, spent in points], dtype=torch.float64)
    ).solution.flatten()
    return float(solved[1] * 1000), float(solved[2] * 1000)


def add_ledger_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ledger-processes", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="none: not measured")
    parser.add_argument("--ledger-pairs", type=int, default=2_000_000)
    parser.add_argument("--ledger-batch", type=int, default=1280)
    parser.add_argument("--ledger-steps", type=int, default=40)


def measure_ledgers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measurements for each number of processes, of a split and of a whole ledger."""
    ways = [(count, shards) for count in options.ledger_processes for shards in (True, False)[: min(count, 2)]]
    return [measure(count, options, shards) for count, shards in ways]
