"""Time and memory of the sample ledger at ten million pairs.

python benchmarks/ledger.py [--pairs 10000000] [--batch 4096] [--output benchmarks/results/ledger.json]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from hf_dissect import SampleLedger

COLUMNS = ("correlation", "history")


def measure(ledger: SampleLedger, batches: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of reading and of writing one batch: median and 99th percentile."""
    values = torch.rand(len(batches[0]))
    seconds = {"read": [], "write": []}
    for batch in batches:
        start = time.perf_counter()
        ledger.read("history", batch)
        middle = time.perf_counter()
        ledger.write("history", batch, values)
        seconds["read"].append(middle - start)
        seconds["write"].append(time.perf_counter() - middle)
    return {
        f"{name}_ms_{label}": float(np.quantile(times, quantile) * 1000)
        for name, times in seconds.items()
        for label, quantile in (("median", 0.5), ("p99", 0.99))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    rows = SampleLedger(options.pairs, COLUMNS)
    places = [torch.randint(options.pairs, (options.batch,), generator=generator) for _ in range(options.repeats)]
    results = {"pairs": options.pairs, "batch": options.batch, "torch": torch.__version__}
    results["row_numbers"] = measure(rows, places)
    column_bytes = sum(rows.column(name).nbytes for name in COLUMNS)
    results["row_numbers"]["bytes_per_pair_and_column"] = column_bytes / options.pairs / len(COLUMNS)

    keys = torch.randint(2**62, (options.pairs,), generator=generator)
    hashed = SampleLedger(columns=COLUMNS)
    start = time.perf_counter()
    for part in keys.split(1_000_000):
        hashed.write("correlation", part, torch.zeros(len(part)))
    results["hashed_ids"] = {"insert_all_s": time.perf_counter() - start}
    results["hashed_ids"].update(measure(hashed, [keys[place] for place in places]))

    print(json.dumps(results, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
