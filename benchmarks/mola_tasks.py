"""Does a mixture of low-rank adapters help on tasks that conflict? Small pictures, each task with labels of its own.

    python benchmarks/mola_tasks.py --data tasks32 --tune --output FILE.json [--workers 2]
    python benchmarks/mola_tasks.py --data tasks32 --output FILE.json [--seeds 0,1,2] [--workers 2]
    python benchmarks/mola_tasks.py --data tasks32 --methods single,hard,mola-grad-norms --seeds 0 --split validation
    python benchmarks/mola_tasks.py --output FILE.json --table

The folder holds npz files with the arrays NAME/image (uint8, n x 32 x 32 x 3), NAME/label and NAME/split (0 train, 1
validation, 2 test) of each task. Of the nine tasks of the table, those that the folder lacks are named and left out;
further ones that it has are used.

All methods train a ResNet of four stages from scratch, with a linear head for each task, in the same number of steps,
on the same rows: a batch has as many of each task. `single` has a network per task, `hard` one for all, `lora` one
with LoRA of as many parameters as the mixture has (rank E r, on the same convolutions), and `-norms` stands for
normalisation per task: for `router`, mixed by its weights. The base trains jointly with the adapters. All but `router`
are told the task of a test image; `router` knows it from its head alone.

`--tune` chooses learning rate and alpha of each method on validation, in shorter runs, one setting after the other
(GRID in mola_task_runs.py), and keeps them in FILE.json, where later runs find them. The test split is for the table.
Its score is the share of the gap between `hard` and `single` that a method closes, seed by seed: 0 % is hard sharing,
100 % a network for each task.

One run of 4,000 steps takes one core 3 (`hard`) to 10 minutes (`mola-router-norms`), all methods with three seeds take
about three hours, and tuning all of them about 40 minutes.
Runs that FILE.json has are not repeated.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from mola_task_runs import GRID, METHODS, list_tasks, run
from tqdm.auto import tqdm


def main() -> None:
    options = parse()
    content = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    runs, tuned, trials = (
        content.get(key, kind()) for key, kind in (("runs", list), ("tuned", dict), ("trials", list))
    )

    def save() -> None:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            content = {"tuned": tuned, "runs": runs, "trials": trials}
            options.output.write_text(json.dumps(content, indent=1) + "\n")

    if not options.table:
        options.tasks = list_tasks(options.data, options.tasks)
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            if options.tune:
                tune(pool, tuned, trials, save, options)
            else:
                tuned |= {made["method"]: choose(trials, made["method"]) for made in trials}
                measure(pool, tuned, runs, save, options)
    if options.tune:
        print(json.dumps(tuned, indent=1))
    else:
        print(markdown(runs))


def measure(pool: ProcessPoolExecutor, tuned: dict, runs: list[dict], save, options: argparse.Namespace) -> None:
    """Make the runs that are not there yet, and save after each."""
    done = {(made["method"], made["seed"], made["steps"], made["split"]) for made in runs}
    planned = [
        (method, seed)
        for seed in options.seeds
        for method in options.methods
        if (method, seed, options.steps, options.split) not in done
    ]
    jobs = [pool.submit(run, method, seed, tuned.get(method, {}), options) for method, seed in planned]
    for job in tqdm(as_completed(jobs), "runs", len(jobs), disable=not jobs):
        runs.append(job.result())
        save()
        made = runs[-1]
        tqdm.write(f"{made['method']}, seed {made['seed']}: {made['mean']:.2%}, {made['seconds']:.0f} s")


def tune(pool: ProcessPoolExecutor, tuned: dict, trials: list[dict], save, options: argparse.Namespace) -> None:
    """Choose the settings of each method one after the other, by the mean accuracy on validation."""
    options.split, options.steps = "validation", options.tuning_steps
    for method in options.methods:  # a method that was tuned before starts from what was chosen
        start = {name: getattr(options, name) for name in GRID[method]}
        tuned[method] = start | tuned.get(method, {})

    def find(method: str, settings: dict) -> float | None:
        key = {"method": method, "settings": settings, "steps": options.steps}
        return next((trial["mean"] for trial in trials if key.items() <= trial.items()), None)

    for place in tqdm(range(max(len(GRID[method]) for method in options.methods)), "settings"):
        candidates = {}
        for method in options.methods:
            for name, values in list(GRID[method].items())[place : place + 1]:
                candidates[method] = [tuned[method] | {name: value} for value in values]
        jobs = [
            pool.submit(run, method, 0, settings, options)
            for method, each in candidates.items()
            for settings in each
            if find(method, settings) is None
        ]
        for job in tqdm(as_completed(jobs), "trials", len(jobs), disable=not jobs, leave=False):
            trials.append(job.result())
            save()
        for method, each in candidates.items():
            tuned[method] = max(each, key=lambda settings, method=method: find(method, settings))
        save()
    tuned |= {method: choose(trials, method) for method in options.methods}
    save()


def choose(trials: list[dict], method: str) -> dict:
    """The settings of the best of all trials of a method, those with the most steps."""
    own = [trial for trial in trials if trial["method"] == method]
    return max(own, key=lambda trial: (trial["steps"], trial["mean"]))["settings"]


def markdown(runs: list[dict]) -> str:
    """The table: accuracy by task, their mean, and the share of the gap that is closed."""
    means = {(made["method"], made["seed"]): made["mean"] for made in runs}
    tasks = list(runs[0]["accuracy"]) if runs else []
    lines = [["method", *tasks, "mean", "gap closed", "parameters", "s per 1,000 steps", "seeds"]]
    lines.append(["---"] * len(lines[0]))
    for method in METHODS:
        own = [made for made in runs if made["method"] == method]
        if own:
            closed = []
            for made in own:
                hard, single = (means.get((end, made["seed"])) for end in ("hard", "single"))
                if hard is not None and single is not None and hard != single:
                    closed.append((made["mean"] - hard) / (single - hard))
            cells = [show([made["accuracy"][task] for made in own]) for task in tasks]
            cells += [show([made["mean"] for made in own]), show(closed)]
            speed = statistics.median(made["seconds"] / made["steps"] for made in own) * 1000
            lines.append([method, *cells, f"{own[0]['parameters']:,}", f"{speed:.0f}", str(len(own))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(values: list[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * 100:.1f}{spread}"


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the npz files of the tasks")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="names of the tasks; all without it")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--tune", action="store_true", help="choose the settings on validation, and keep them")
    parser.add_argument("--tuning-steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="JSON with settings and runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs in --output")
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--steps", type=int, default=4000)
    schedule.add_argument("--batch", type=int, default=8, help="images of each task in a batch")
    schedule.add_argument("--lr", type=float, default=5e-3)
    schedule.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    schedule.add_argument("--weight-decay", type=float, default=0.05)
    schedule.add_argument("--label-smoothing", type=float, default=0.1)
    schedule.add_argument("--shift", type=int, default=3, help="pixels of the largest shift")
    network = parser.add_argument_group("network")
    network.add_argument("--widths", type=numbers, default=[16, 32, 64, 128], help="of the stages")
    network.add_argument("--ranks", type=numbers, default=[2, 4, 16, 32], help="of one expert, by stage")
    network.add_argument("--alpha", type=float, default=1, help="divided by the rank of the first stage")
    network.add_argument("--adapter-lr", type=float, default=1, help="times the learning rate")
    network.add_argument("--router-side", type=int, default=8, help="pixels of the image that the router sees")
    network.add_argument("--decorrelation", type=float, default=0.1, help="weight of the router's loss")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--methods {','.join(sorted(unknown))}: the methods are {', '.join(METHODS)}")
    if len(options.widths) != len(options.ranks):
        parser.error(f"--ranks has {len(options.ranks)} numbers, --widths {len(options.widths)}: one for each stage")
    if not options.table and not options.data:
        parser.error("--data is missing: a folder with npz files of tasks")
    if options.table and not (options.output and options.output.exists()):
        parser.error("--table needs --output FILE.json with runs")
    return options


if __name__ == "__main__":
    main()
