"""Does a run lose anything when it is cut short? Each fault at random moments; the resumed run against the whole one.

    python benchmarks/faults.py [--trials 20] [--seed 0] [--faults kill,sigterm] [--output-dir benchmarks]

A trial is a small training in a process of its own that saves after each step, so that a good share of the moments
falls into the writing of a checkpoint. The fault strikes somewhere in a random step; then the run is resumed and what
it leaves behind is compared, bit for bit, with what an uninterrupted run leaves: weights, optimiser, ledger, the
choice of each step (`selection.parquet`), the logs, and the state of selection and data. A trial whose run ends
before the fault strikes is repeated. With `--output-dir`, `faults.md` and `results/faults.json` are written there.

The full disk is a small tmpfs that is filled at a random moment (root alone can mount one); without it, a limit to
the size of files that is lowered at that moment. Linux only.
"""

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers
from fault_runs import STEPS, Run, Setup, left_behind

from hf_dissect.training.checkpoints import UNFINISHED_FOLDER

DISK_BYTES = 32 * 2**20
FAULTS = ("kill", "kill-stream", "kill-ranks", "sigterm", "worker", "worker-stream", "disk", "nan")
PAGE = """# Faults

Made by `python benchmarks/faults.py --output-dir benchmarks` ({trials} trials of each fault).

A small CLIP trains eight steps with dissect (momentum variant), dropout and a checkpoint after each step; the last
two are kept. The fault strikes at a random moment of the run. Then the run is resumed from its last complete
checkpoint, and what it leaves behind is compared, bit for bit, with what an uninterrupted run leaves: weights,
optimiser, ledger, the choice of each step, the logs without times, and the state of selection and data; nothing
unfinished may be left. With two ranks, either is killed, and the other a moment later.

{table}

A step made again is one whose checkpoint was not complete when the fault struck: its work is lost, its result is not.
"""


def kill(run: Run, generator: random.Random) -> None:
    run.process.kill()


def kill_rank(run: Run, generator: random.Random) -> None:
    """Kill one of the ranks, and a moment later the others, as torchrun does."""
    first, *others = generator.sample(run.processes, len(run.processes))
    first.kill()
    time.sleep(generator.uniform(0, 0.05))
    for process in others:
        process.kill()


def tell_to_end(run: Run, generator: random.Random) -> None:
    run.process.terminate()


def kill_worker(run: Run, generator: random.Random) -> None:
    """Kill one of the data workers, as soon as there is one."""
    while run.process.is_alive():
        try:
            if workers := psutil.Process(run.process.pid).children():
                generator.choice(workers).kill()
                return
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.001)


@dataclass
class FullDisk:
    """Lets a disk be full, at a random place within the next checkpoint, until `make_room`."""

    mount: Path | None
    setup: Setup

    def fill(self, run: Run, generator: random.Random) -> None:
        if self.mount is None:
            limit = generator.randrange(self.setup.checkpoint_bytes // 2)
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return
        rest = generator.randrange(self.setup.checkpoint_bytes)
        with open(self.mount / "filler", "wb") as filler:
            while True:
                disk = os.statvfs(self.mount)
                try:
                    os.posix_fallocate(filler.fileno(), 0, max(1, disk.f_bavail * disk.f_bsize - rest))
                    return
                except OSError:  # the run has written something in between
                    pass

    def make_room(self) -> None:
        if self.mount is not None:
            (self.mount / "filler").unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of `DISK_BYTES`; None where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@dataclass(frozen=True)
class Fault:
    """What strikes, in which setup, and the exit statuses that a run may end with."""

    title: str
    setup: Setup
    strike: Callable[[Run, random.Random], None] | None
    statuses: tuple[int, ...]
    folder: Path
    mend: Callable[[], None] = lambda: None
    is_in_writing: bool | None = None


def try_fault(fault: Fault, generator: random.Random) -> dict[str, object] | None:
    """One fault and the resumed run after it; None when the run ended before the fault struck."""
    folder = fault.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    step = generator.randint(0, STEPS)
    pause = generator.uniform(0, fault.setup.step_seconds)
    poison = (max(1, step), generator.getrandbits(32)) if fault.strike is None else None
    run = Run(fault.setup, folder, poison)
    was_there = run.wait_for(step)
    in_writing = fault.is_in_writing
    if was_there and fault.strike is not None:
        time.sleep(pause)
        fault.strike(run, generator)
        if -signal.SIGKILL in fault.statuses:
            for process in run.processes:
                process.join()
        if in_writing is None:
            in_writing = (folder / UNFINISHED_FOLDER).exists()
    status = run.end()
    fault.mend()
    if status == 0:
        return None
    if status not in fault.statuses:
        raise SystemExit(f"{fault.title}: ended with status {status}, not {fault.statuses}: {run.last('error')}")
    resumed = Run(fault.setup, folder)
    if (resumed_status := resumed.end()) != 0:
        raise SystemExit(f"{fault.title}: resuming in {folder} failed ({resumed_status}): {resumed.last('error')}")
    found = left_behind(folder)
    return {
        "step": run.last("step") or 0,
        "in_writing": in_writing,
        "saved": run.last("saved") or 0,
        "resumed_from": resumed.last("begin"),
        "differs_in": [name for name, value in fault.setup.reference.items() if found[name] != value],
    }


def summary(title: str, trials: list[dict]) -> dict[str, object]:
    in_writing = [trial["in_writing"] for trial in trials]
    return {
        "fault": title,
        "tried": len(trials),
        "in_writing": None if None in in_writing else sum(in_writing),
        "resumed_from_older": sum(trial["resumed_from"] < trial["saved"] for trial in trials),
        "differ": sum(bool(trial["differs_in"]) for trial in trials),
        "steps_repeated_mean": sum(trial["step"] - trial["resumed_from"] for trial in trials) / len(trials),
        "trials": trials,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| fault | tried | fell into the writing of a checkpoint | resumed from an older checkpoint than the last "
        "complete one | runs that differ from the uninterrupted one | steps made again, mean |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        in_writing = "-" if row["in_writing"] is None else row["in_writing"]
        lines.append(
            f"| {row['fault']} | {row['tried']} | {in_writing} | {row['resumed_from_older']} | {row['differ']} | "
            f"{row['steps_repeated_mean']:.2f} |"
        )
    return "\n".join(lines)


def faults(setups: dict[str, Setup], disk: FullDisk, folder: Path) -> dict[str, Fault]:
    def fault(title: str, setup: str, strike, *statuses: int, **further) -> Fault:
        return Fault(title, setups[setup], strike, statuses, **{"folder": folder, **further})

    on_disk = {"mend": disk.make_room, "folder": disk.mount or folder, "is_in_writing": True}
    way = "a file-size limit" if disk.mount is None else "a full tmpfs"
    return {
        "kill": fault("kill -9", "map", kill, -signal.SIGKILL),
        "kill-stream": fault("kill -9, stream, 2 workers", "stream", kill, -signal.SIGKILL),
        # A rank that notices the end of another before its own ends with an error.
        "kill-ranks": fault("kill -9, stream, 2 ranks with a sharded ledger", "ranks", kill_rank, -signal.SIGKILL, 1),
        # The second one when it comes after the last step: what is left to do may be ended at once.
        "sigterm": fault("SIGTERM", "map", tell_to_end, 128 + signal.SIGTERM, -signal.SIGTERM),
        "worker": fault("kill -9 of one of 2 data workers", "map, 2 workers", kill_worker, 2),
        "worker-stream": fault("kill -9 of one of 2 data workers, stream", "stream", kill_worker, 2),
        "disk": fault(f"no room on the disk ({way})", "map", disk.fill, 2, **on_disk),
        "nan": fault("NaN in a weight or in the loss", "map", None, 2),
    }


def measure(options: argparse.Namespace, work: Path) -> list[dict]:
    setups = {
        "map": Setup(stream=False, workers=0),
        "map, 2 workers": Setup(stream=False, workers=2),
        "stream": Setup(stream=True, workers=2),
        "ranks": Setup(stream=True, workers=1, ranks=2),
    }
    rows = []
    with small_disk(work / "disk") as mount:
        disk = FullDisk(mount, setups["map"])
        for name, fault in faults(setups, disk, work).items():
            if name not in options.faults:
                continue
            if not fault.setup.reference:
                fault.setup.prepare(work / "reference")
                shutil.rmtree(work / "reference")
            generator = random.Random(f"{options.seed} {name}")
            trials = []
            while len(trials) < options.trials:
                if (trial := try_fault(fault, generator)) is not None:
                    trials.append(trial)
            rows.append(summary(fault.title, trials))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each fault (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=FAULTS, help=f"of {','.join(FAULTS)} (default: all)"
    )
    parser.add_argument("--output-dir", type=Path, help="folder for faults.md and results/faults.json")
    options = parser.parse_args()
    if unknown := set(options.faults) - set(FAULTS):
        parser.error(f"--faults: unknown {', '.join(unknown)}; known are {', '.join(FAULTS)}")
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # the forked runs need not look through what was imported
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(options, Path(work))
    print(table(rows))
    if options.output_dir:
        (options.output_dir / "results").mkdir(parents=True, exist_ok=True)
        results = {"seed": options.seed, "seconds": time.perf_counter() - start, "torch": torch.__version__}
        results |= {"faults": rows}
        (options.output_dir / "results" / "faults.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.output_dir / "faults.md").write_text(PAGE.format(table=table(rows), trials=options.trials))


if __name__ == "__main__":
    main()
