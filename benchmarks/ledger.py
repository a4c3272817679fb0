"""Time and memory of the sample ledger: ten million pairs by default, or as many as the memory holds.

    python benchmarks/ledger.py [--pairs 10000000] [--batch 4096] [--output benchmarks/results/ledger.json]
    python benchmarks/ledger.py --pairs 100000000 --batch 10240 81920 --output benchmarks/results/ledger_100m.json

A batch is that of all ranks together, as each rank writes what all have scored. Arbitrary ids are met one batch after
the other, the largest batch size given, as in the first epoch of a training: the slowest of these steps is what growth
costs at worst. Times of steps are processor time, which whoever else uses the machine does not lengthen; of files they
are wall-clock. Memory is that of this process, read from /proc (Linux).
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from results_file import show_and_write

from hf_dissect import SampleLedger

COLUMNS = ("correlation", "history")


def hashed_ids(places: torch.Tensor) -> torch.Tensor:
    """A different id below 2 ** 62 for each place, as good as random; computed, as keeping them would cost memory."""
    ids = (places + 1) * 5871781006564002453 & (2**62 - 1)  # an odd factor and a shift keep different ids different
    return ids ^ (ids >> 29)


def measure(ledger: SampleLedger, batches: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds for one batch of known pairs, median and 99th percentile: to read a column, to write it, and for a
    step of dissect's momentum variant, which writes the correlation and reads and writes the history."""
    values, found = torch.rand(len(batches[0])), {}

    def step(batch: torch.Tensor) -> None:
        ledger.write("correlation", batch, values)
        ledger.read("history", batch)
        ledger.write("history", batch, values)

    actions = {
        "read": lambda batch: ledger.read("history", batch),
        "write": lambda batch: ledger.write("history", batch, values),
        "step": step,
    }
    for name, act in actions.items():
        seconds = []
        for batch in batches:
            start = time.process_time()
            act(batch)
            seconds.append(time.process_time() - start)
        found |= {f"{name}_ms_{label}": milliseconds(seconds)[label] for label in ("median", "p99")}
    return found


def milliseconds(seconds: list[float]) -> dict[str, float]:
    quantiles = {"median": 0.5, "p99": 0.99, "worst": 1.0}
    return {label: float(np.quantile(seconds, quantile) * 1000) for label, quantile in quantiles.items()}


def measure_sizes(ledger: SampleLedger, batches: dict[int, list[torch.Tensor]]) -> dict[str, object]:
    """`measure` for the first batch size, and for the others under "at_batch"."""
    first, *others = ({"batch": size, **measure(ledger, parts)} for size, parts in batches.items())
    return first | ({"at_batch": others} if others else {})


def measure_growth(ledger: SampleLedger, pairs: int, batch: int) -> dict[str, float]:
    """Fill a ledger from nothing by steps of one batch, each a write of two columns."""
    seconds, values = [], torch.rand(batch)
    for start in range(0, pairs, batch):
        ids = hashed_ids(torch.arange(start, min(start + batch, pairs)))
        begin = time.process_time()
        for name in COLUMNS:
            ledger.write(name, ids, values[: len(ids)])
        seconds.append(time.process_time() - begin)
    steps = {f"step_ms_{label}": value for label, value in milliseconds(seconds).items()}
    return {"batch": batch, "insert_all_s": sum(seconds), **steps}


def measure_files(ledger: SampleLedger) -> dict[str, float]:
    """Save and load a ledger; memory is what each needs beyond what the ledger takes itself."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.safetensors"
        for name in ("save", "load"):
            target = ledger if name == "save" else SampleLedger(columns=COLUMNS)
            before = forget_peak()
            start = time.perf_counter()
            getattr(target, name)(path)
            found[f"{name}_s"] = time.perf_counter() - start
            found[f"{name}_peak_gib"] = memory_gib("VmHWM") - before
        found["file_bytes_per_pair"] = path.stat().st_size / len(ledger)
        some = hashed_ids(torch.arange(0, len(ledger), max(1, len(ledger) // 1000)))
        assert torch.equal(ledger.read("history", some), target.read("history", some))
    return found


def memory_gib(field: str) -> float:
    """`VmRSS`, what this process has in memory now, or `VmHWM`, the most it had since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def forget_peak() -> float:
    """Start to look for the peak anew; returns what is in memory now, in GiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_gib("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    places = {
        size: [torch.randint(options.pairs, (size,), generator=generator) for _ in range(options.repeats)]
        for size in options.batch
    }
    results = {"pairs": options.pairs, "batch": options.batch[0], "torch": torch.__version__}

    hashed = SampleLedger(columns=COLUMNS)
    before = forget_peak()
    growth = measure_growth(hashed, options.pairs, max(options.batch))
    memory = {"before_gib": before, "after_gib": memory_gib("VmRSS"), "peak_gib": memory_gib("VmHWM")}
    for name in ("after", "peak"):
        memory[f"bytes_per_pair_{name}"] = (memory[f"{name}_gib"] - before) * 2**30 / options.pairs
    known = {size: [hashed_ids(part) for part in parts] for size, parts in places.items()}
    results["hashed_ids"] = {"insert_all_s": growth["insert_all_s"], **measure_sizes(hashed, known)}
    results["hashed_ids"] |= {"growth": growth, "memory": memory, "files": measure_files(hashed)}
    del hashed

    rows = SampleLedger(options.pairs, COLUMNS)
    results["row_numbers"] = measure_sizes(rows, places)
    column_bytes = sum(rows.column(name).nbytes for name in COLUMNS)
    results["row_numbers"]["bytes_per_pair_and_column"] = column_bytes / options.pairs / len(COLUMNS)

    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
