"""How selection scales with the number of processes: measured on this machine, and on paper for up to 1,024 GPUs.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json --report benchmarks/scaling.md

Measured: the model and scenes of the quickstart recipe with 1, 2 and 4 gloo processes, each with the same number of
candidates (weak scaling), with local and with global choice. Wall-clock needs a core for each process to mean
anything; processor time per step does not. The ledger of hashed ids: see `scaling_ledger.py`. On paper: see
`scaling_model.py`.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from scaling_ledger import add_ledger_options, fit_exchange, measure_ledgers
from scaling_model import Assumptions, costs
from transformers import TrainerCallback

GPUS = (8, 64, 256, 1024)
WARMUP_STEPS = 4
FIGURES = {"steps_per_s": 2, "step_ms": 0, "processor_ms": 0}  # and the decimals they are shown with
PARTS = ("scoring", "exchange of scores", "feature exchange", "rebalancing", "ledger")


# ---- measured ----


class Clock(TrainerCallback):
    """Remembers wall-clock, processor time and the times of the parts after the first steps and at the end."""

    def __init__(self, times):
        self._times, self.marks = times, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP_STEPS, state.max_steps):
            self.marks.append((time.perf_counter(), time.process_time(), self._times.measure_so_far()))


def charge(owner, name: str, times, part: str) -> None:
    """Let each call of `owner.name` count for `part`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*arguments, **keywords):
        with times.measure(part):
            return original(*arguments, **keywords)

    setattr(owner, name, timed)


def work(options: argparse.Namespace) -> None:
    """One process of a measured run; writes its figures into the folder."""
    from hf_dissect import distributed
    from hf_dissect.distributed import Ranks
    from hf_dissect.recipe.recipe import Recipe
    from hf_dissect.runs.run import build_trainer
    from hf_dissect.selection import SampleLedger, scope

    torch.set_num_threads(1)
    settings = {
        "selection.scope": options.worker,
        "selection.options": "{variant: momentum}",
        "data.scenes_train": options.pairs,
        "data.scenes_validation": 0,
        "data.scenes_test": 0,
        "evaluation.zero_shot": "null",
        "training.use_cpu": "true",
        "training.per_device_train_batch_size": options.batch,
        "training.max_steps": WARMUP_STEPS + options.steps,
        "training.eval_strategy": "'no'",
        "training.save_strategy": "'no'",
        "training.disable_tqdm": "true",
        "training.report_to": "none",
        "training.output_dir": options.folder,
    }
    trainer = build_trainer(Recipe.load("quickstart", [f"{key}={value}" for key, value in settings.items()]))
    trainer.args.save_run_folder = False
    times, clock = trainer.times, Clock(trainer.times)
    for name in ("gather_columns", "gather_numbers"):
        charge(Ranks, name, times, "exchange of scores")
    for name in ("forward", "backward"):
        charge(distributed._GatherWithGrad, name, times, "feature exchange")
    charge(scope, "rebalance", times, "rebalancing")
    for name in ("read", "write"):
        charge(SampleLedger, name, times, "ledger")
    trainer.add_callback(clock)
    trainer.train()
    (begin, begin_processor, parts_before), (end, end_processor, parts) = clock.marks
    figures = {"step_ms": (end - begin) / options.steps * 1000}
    figures["processor_ms"] = (end_processor - begin_processor) / options.steps * 1000
    for part in PARTS:
        spent = parts.get(part, 0.0) - parts_before.get(part, 0.0)
        figures[part] = spent / (end - begin)
    rank = int(os.environ.get("RANK", "0"))
    (Path(options.folder) / f"{rank}.json").write_text(json.dumps(figures))


def measure(options: argparse.Namespace, processes: int, scope: str) -> dict[str, float]:
    """Means over the processes of one run: milliseconds of a step, and the share of each part in it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--worker", scope, "--folder", folder]
        command += [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "pairs")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL if options.quiet else None)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    figures = {key: sum(each[key] for each in found) / processes for key in found[0]}
    return {"processes": processes, "scope": scope, "steps_per_s": 1000 / figures["step_ms"], **figures}


# ---- the report ----


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 119)


def amount(number: float) -> str:
    """Bytes, readable."""
    if not number:
        return "-"
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def measured_section(results: dict) -> str:
    if not results["measured"]:
        return ""
    rows = [
        [str(row["processes"]), row["scope"], *(f"{row[key]:.{digits}f}" for key, digits in FIGURES.items())]
        + [f"{row[part]:.1%}" for part in PARTS]
        for row in results["measured"]
    ]
    heading = ["processes", "choice", "steps/s", "step, ms", "processor, ms", *PARTS]
    text = prose(
        f"""{results["cores"]} processor cores, gloo, one thread a process, {results["batch"]} candidates a process and
        step (weak scaling), mean over {results["steps"]} steps and the processes. With more processes than cores, or
        other users of the machine, a step takes longer because the cores are shared: compare processor times. Shares
        are of the wall-clock of a step, and include waiting for other processes."""
    )
    return f"## Measured\n\n{text}\n\n{markdown_table(heading, rows)}\n"


def ledger_section(results: dict) -> str:
    if not results["ledger"]:
        return ""
    rows = [
        [str(row["processes"]), row["ledger"], f"{row['own_pairs']:,.0f}", f"{row['memory_mib']:.0f}"]
        + [f"{row['processor_ms']:.2f}"]
        for row in results["ledger"]
    ]
    sizes = results["ledger_sizes"]
    text = prose(
        f"""Hashed ids of {sizes["pairs"]:,} pairs, {sizes["batch"]} candidates a process and step, whose history is
        read and recorded as by dissect: processor time of each process with its exchanges by gloo, mean over
        {sizes["steps"]} steps and the processes. Least squares give {results["message_us"] or 0:.0f} us for a message
        to another process and one from it, and {results["stage_us"] or 0:.0f} us for a stage of an exchange. From 16
        processes on, packets go in stages: of 16 processes, each sends to 2 times 3 others, of 1,024 to 5 times 3."""
    )
    table = markdown_table(["processes", "ledger", "pairs in each", "MiB in each", "processor, ms a step"], rows)
    return f"## The ledger of hashed ids, measured\n\n{text}\n\n{table}\n"


def paper_section(results: dict) -> str:
    a, paper = Assumptions(**results["assumptions"]), results["paper"]
    rows = []
    for part in next(iter(paper.values())):
        cells = [paper[gpus][part] for gpus in paper]
        rows.append([part])
        for cell in cells:
            share = cell["seconds"] / a.step_seconds
            rows[-1].append(f"{amount(cell['bytes'])}, {cell['seconds'] * 1000:.3g} ms, {share:.2%}")
    moves = [
        [
            gpus,
            *(f"{part[key]:.1f}" for key in ("pairs_mean", "pairs_mean_simulated", "pairs_of_the_fullest_rank")),
            f"{part['planning_ms']:.1f}",
        ]
        for gpus, part in ((gpus, parts["global: rebalancing"]) for gpus, parts in paper.items())
    ]
    assumed = prose(
        f"""{a.candidates} candidates a GPU, {a.kept} of them train; embeddings of {a.dim} float32 numbers. A step is
        taken to last {a.step_seconds * 1000:.0f} ms: ViT-B/16 CLIP, one forward pass of the candidates and three times
        that for those that train, at {a.utilisation:.0%} of {a.peak_tflops:.0f} TFLOP/s (H100 or H200, bfloat16).
        {a.gpus_per_node} GPUs a machine, NVLink of {a.nvlink_gb:.0f} GB/s and a network card of {a.nic_gbps:.0f} Gb/s
        each; {a.net_hop_us:g} us for a hop between machines, {a.nvlink_hop_us:g} us within. Each cell: bytes that a
        GPU receives in a step; the time they take if nothing overlaps; that time as a share of a step."""
    )
    explained = prose(
        f"""Gradients are there without selection, too, and overlap with the backward pass. The softmax loss gathers
        both embeddings and sends back both gradients; the ring of the sigmoid loss sends one of each from GPU to GPU.
        Rebalancing waits for the rank that gives away most. The ledger of hashed ids is split over the processes. Its
        exchanges, three of packets, run in a thread next to the training: two during the scoring forward pass, a
        quarter of the step and more, and one during the training. If each GPU has a core for that thread, only what
        the own pairs cost is waited for. The exchanges cost {a.message_us:.0f} us of one core for a message and
        {a.stage_us:.0f} us for a stage, as measured above, and an id {a.ledger_ns:.0f} ns, one look-up and
        two writes among a hundred million (`results/ledger_100m.json`). Row numbers address the ledger
        directly, and every process records the candidates of all, {a.row_ns:.0f} ns for each."""
    )
    moving = prose(
        f"""Where scores do not depend on the rank, the number of pairs that a rank keeps is hypergeometric: B draws
        out of G B candidates, of which G k are kept. With p = k / B its variance is
        B p (1 - p) (G - 1) B / (G B - 1), and a rank gives away sqrt(variance / (2 pi)) pairs on average, of
        {a.pair_bytes / 1000:.0f} kB each. The last column is the time in which `plan_moves` finds who sends to
        whom."""
    )
    table = markdown_table(["part", *(f"{gpus} GPUs" for gpus in paper)], rows)
    moved = markdown_table(["GPUs", "formula", "simulated", "fullest rank", "planning, ms"], moves)
    return f"""## On paper

{assumed}

{table}

{explained}

### Pairs moved by a global choice

{moving}

{moved}
"""


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="none: only on paper")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--report", type=Path)
    add_ledger_options(parser)
    parser.add_argument("--quiet", action="store_true", help="without what the processes say")
    parser.add_argument("--worker", choices=("local", "global"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_assumptions(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return

    assumptions = Assumptions(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Assumptions)}
    )
    results = {"torch": torch.__version__, "cores": os.cpu_count(), "batch": options.batch, "steps": options.steps}
    results["assumptions"] = dataclasses.asdict(assumptions)
    results["step_ms_on_paper"] = assumptions.step_seconds * 1000
    results["paper"] = {str(gpus): costs(assumptions, gpus) for gpus in GPUS}
    results["measured"] = [
        measure(options, number, scope) for number in options.processes for scope in ("local", "global")
    ]
    results["ledger"] = measure_ledgers(options)
    results["ledger_sizes"] = {name: getattr(options, f"ledger_{name}") for name in ("pairs", "batch", "steps")}
    results["stage_us"], results["message_us"] = fit_exchange(results["ledger"])
    sections = [measured_section(results), ledger_section(results), paper_section(results)]
    report = "\n".join(["# How selection scales\n", *filter(None, sections)])
    print(report)
    if options.report:
        options.report.write_text(report + "\nWritten by `benchmarks/scaling.py`.\n")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
