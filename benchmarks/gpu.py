"""Everything of a training step that a CPU cannot tell, in one run of at most eight minutes on one GPU.

    python benchmarks/gpu.py [--parts steps-b32,resume,...] [--budget 470] [--output FILE.json]
    python benchmarks/gpu.py --tiny               # every part on the CPU, with sizes too small to measure anything

CLIP from its configuration (ViT-B/32 and ViT-B/16 at 224 px), pictures made of random numbers, bfloat16 by autocast:

    steps-b32, steps-b16   plain step on 1,024 and 4,096 candidates, selected step at r = 0.2 and 0.5, with every
                           candidate scored and with rescore_every 8, and a step that trains the kept pairs only.
                           `efficiency` is the time of the last over that of the selected step. More than 1,024 pairs
                           train by GradCache
    grad_cache             the same batch at once and in chunks of a quarter and a sixteenth
    adapters               LoRA, MoLA with the experts of the tasks, MoLA with a router; frozen base
    peers                  the training steps of `benchmarks/peers.py`
    compile                DissectTrainer with and without torch_compile
    pictures               patch_dropout 0.5 (where this version has the setting), and pictures of half the side
    resume                 two equal runs and one that is resumed at its middle: largest difference of a weight
    fp16                   float16 with its scaler: steps that were skipped after an overflow
    collectives            a process group of one (NCCL): the gathers of hf_dissect, and a selection of global scope

Each step has the peak of the allocator in MiB, and what it rose by in the step. A part has a limit of its own and may
fail without ending the run; the JSON is written after each part. Without CUDA and without --tiny nothing is run or
written.
"""

import argparse
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_collectives
import gpu_exactness
import gpu_steps
import gpu_trainers
import peer_steps
import torch
from gpu_run import PartTimeout, Run
from results_file import show_and_write

Part = Callable[[Run], dict[str, Any]]
PARTS: dict[str, tuple[Part, float]] = {
    "steps-b32": (lambda run: gpu_steps.measure_steps(run, "ViT-B/32"), 90),
    "resume": (gpu_exactness.measure_resume, 45),
    "fp16": (gpu_exactness.measure_fp16, 30),
    "collectives": (gpu_collectives.measure, 60),
    "grad_cache": (gpu_steps.measure_grad_cache, 45),
    "adapters": (gpu_steps.measure_adapters, 45),
    "peers": (gpu_trainers.measure_peers, 60),
    "pictures": (gpu_trainers.measure_pictures, 45),
    "steps-b16": (lambda run: gpu_steps.measure_steps(run, "ViT-B/16"), 120),
    "compile": (gpu_trainers.measure_compile, 90),
}
"""Parts and their limits in seconds; the last ones are the first that a short budget leaves out."""
LEAST = 10


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """End the block by a `PartTimeout` after some seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise PartTimeout(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Part, run: Run, seconds: float) -> dict[str, Any]:
    """Return the figures of a part, or its error and what it had found; with its seconds in both cases."""
    start, run.found = time.perf_counter(), {}
    run.deadline = start + 0.8 * seconds  # rounds end before, so that what was measured is kept
    try:
        with limit(seconds):
            figures = part(run)
    except PartTimeout as error:
        figures = {**run.found, "error": str(error)}
    except Exception as error:
        shown = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        figures = {**run.found, **shown}
    run.free()
    return {**figures, "seconds": round(time.perf_counter() - start, 1)}


def describe_machine(run: Run) -> dict[str, Any]:
    """Return the device and the versions."""
    names = ("torch", "transformers", "accelerate", "peft", "open_clip_torch", "sentence-transformers")
    found: dict[str, Any] = {"versions": peer_steps.list_versions(*names), "tiny": run.tiny, "device": "cpu"}
    if not run.tiny:
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by commas")
    parser.add_argument("--budget", type=float, default=470, help="seconds after which no part begins or continues")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--tiny", action="store_true", help="run every part on the CPU with tiny sizes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--in-process-group", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if not options.tiny and not torch.cuda.is_available():
        print("skipped: no CUDA (--tiny runs every part on the CPU, with sizes too small to measure anything)")
        return
    torch.set_num_threads(1 if options.tiny else torch.get_num_threads())
    peer_steps.silence_loggers()
    run = Run(options.tiny, options.rounds)
    if options.in_process_group:
        gpu_collectives.run_in_process_group(run, options.output)
        return

    end = time.perf_counter() + options.budget
    results: dict[str, Any] = describe_machine(run)
    for name in [name for name in PARTS if name in names]:
        part, most = PARTS[name]
        left = end - time.perf_counter()
        results[name] = (
            run_part(part, run, min(most, left)) if left >= LEAST else {"error": "not begun: the budget is spent"}
        )
        shown = results[name].get("error") or "done"
        print(f"{name:12} {results[name].get('seconds', 0):6.1f} s  {shown}", flush=True)
        if options.output:
            write_quietly(results, options.output)
    show_and_write(results, options.output)


def write_quietly(results: dict[str, Any], output: Path) -> None:
    """Write the results so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
