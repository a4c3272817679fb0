"""How long until a method reaches the best recall of plain training, scoring charged?

    python benchmarks/time_to_quality.py --data flickr8k --noise random40,neighbours40 --output FILE.json \
        --method small_loss --method mine=selection.strategy=small_loss,selection.ratio=0.3
    python benchmarks/time_to_quality.py --data flickr8k --pictures --noise 0,40 --every 20

For each seed and condition, plain training and the methods run in one process, one after the other, on the same pairs,
batches, initial weights and schedule. Every `--every` steps the validation recall is computed, whose time is not
charged; the seconds of data, scoring and training are. The target is the best validation recall of plain training.
`seconds` is when a method first reaches it, `speed_up` how many times sooner than plain training that is, `steps` the
ratio of the steps of plain training to those of the method, which does not depend on the load of the machine. Runs
that never reach the target count as `reached` 0 and have no time. With `--clock processor`, the seconds are those of
the processor, which other work on the machine leaves comparable; processes that load data are not in them.

With `--pictures` a small ViT learns from the photographs, decoded in each step, instead of a head on stored features.
A method is the name of one of noisy_correspondence.py, or NAME=KEY=VALUE,KEY=VALUE with settings of its own. The data
and the conditions are those of noisy_correspondence.py. Runs that FILE.json has are not repeated.
"""

import argparse
import json
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from noisy_methods import METHODS, read_condition
from noisy_runs import charged_seconds, load_recipe, prepare
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_dissect import DissectTrainer
from hf_dissect.evaluation import format_results_table, summarise_seeds

PLAIN = "none"
DEFAULT = ("small_loss", "dissect")
COLUMNS = {
    "method": "method",
    "best": "best on validation",
    "reached": "reached",
    "seconds": "seconds",
    "speed_up": "times sooner",
    "steps": "times fewer steps",
}
DECIMALS = {"best": 1, "reached": 2, "seconds": 1, "speed_up": 2, "steps": 2}


class Curve(TrainerCallback):
    """Steps, charged seconds and validation recall of each evaluation."""

    def __init__(self, trainer: DissectTrainer, clock: str):
        self._trainer, self._clock = trainer, clock
        self._charged = self._since = 0.0  # of the processor
        self.points: list[tuple[int, float, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            self._charged += time.process_time() - self._since

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and (recall := metrics.get("eval_validation_recall_sum")) is not None:
            seconds = self._charged if self._clock == "processor" else charged_seconds(self._trainer)
            self.points.append((state.global_step, seconds, recall))
        self._since = time.process_time()


def run(condition: str, seed: int, methods: list[str], options: argparse.Namespace) -> list[dict]:
    """Train plainly and by each method; their curves."""
    runs = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            given = ["training.eval_strategy=steps", f"training.eval_steps={options.every}"]
            trainer = prepare(method, condition, seed, options, folder, *given, parts=("validation",))
            curve = Curve(trainer, options.clock)
            trainer.add_callback(curve)
            trainer.train()
            settings = {**METHODS, **options.own_methods}[method]
            kind = "photographs" if options.pictures else "features"
            row = {"method": method, "noise": condition, "seed": seed, "data": kind, "settings": settings}
            runs.append({**row, "every": options.every, "clock": options.clock, "curve": curve.points})
    return compare(runs)


def reach(curve: list[tuple[int, float, float]], target: float) -> tuple[int, float] | None:
    """Step and seconds of the first evaluation that has the target."""
    return next(((step, seconds) for step, seconds, recall in curve if recall >= target), None)


def compare(runs: list[dict]) -> list[dict]:
    """The runs of one process with their figures against plain training, which is the first of them."""
    target = max(recall for _, _, recall in runs[0]["curve"])
    step, seconds = reach(runs[0]["curve"], target)
    rows = []
    for run in runs:
        first = reach(run["curve"], target)
        row = {"best": max(recall for _, _, recall in run["curve"]), "target": target}
        row |= {"reached": float(first is not None)}
        if first is not None:
            row |= {"seconds": first[1], "speed_up": seconds / first[1], "steps": step / first[0]}
        rows.append({**run, **row})
    return rows


def summarise(runs: list[dict]) -> list[dict]:
    """A table per data and condition: a row per method, with mean and spread over the seeds."""
    tables = []
    for data, noise in dict.fromkeys((run["data"], run["noise"]) for run in runs):
        own = [run for run in runs if (run["data"], run["noise"]) == (data, noise)]
        rows = []
        for method in dict.fromkeys(run["method"] for run in own):
            figures = [{key: run[key] for key in COLUMNS if key in run} for run in own if run["method"] == method]
            rows.append({**summarise_seeds(figures), "method": method, "runs": len(figures)})
        tables.append({"data": data, "noise": noise, "seeds": sorted({run["seed"] for run in own}), "rows": rows})
    return tables


def read_method(text: str) -> tuple[str, list[str]]:
    """Name and settings of `NAME` or `NAME=KEY=VALUE,KEY=VALUE`."""
    name, _, settings = text.partition("=")
    if settings:
        return name, re.split(r",(?=[\w.]+=)", settings)
    if name not in METHODS:
        raise ValueError(f"{name}: choose of {', '.join(METHODS)}, or give settings: NAME=selection.strategy=random")
    return name, METHODS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Flickr8k")
    parser.add_argument("--method", action="append", metavar="NAME[=KEY=VALUE,...]", help="beside plain training")
    parser.add_argument("--noise", default="random0,random40,neighbours40", help="conditions; 40 is random40")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="of the seconds")
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--pictures", action="store_true", help="photographs instead of stored features")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--workers", type=int, default=1, help="conditions and seeds at a time, one thread each")
    parser.add_argument("--output", type=Path, help="JSON with all runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the tables of the runs in --output")
    options = parser.parse_args()
    try:
        conditions = [read_condition(text.strip()) for text in options.noise.split(",")]
        options.own_methods = dict(map(read_method, options.method or DEFAULT))
    except ValueError as error:
        parser.error(str(error))
    if PLAIN in options.own_methods and options.own_methods[PLAIN] != METHODS[PLAIN]:
        parser.error(f"--method {PLAIN}=...: plain training is what the others are compared with; take another name")
    try:
        for method in (PLAIN, *options.own_methods):
            load_recipe(method, options)
    except ValueError as error:  # before work starts, and with its own words
        parser.error(str(error))
    if options.every < 1:
        parser.error(f"--every {options.every}: at least 1")
    if not options.table and not options.data:
        parser.error("--data is missing: the folder of Flickr8k")

    runs = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
    if not options.table:
        measure(runs, [(name, int(seed)) for seed in options.seeds.split(",") for name in conditions], options)
    tables = summarise(runs)
    for table in tables:
        print(f"\n{table['data']}, {table['noise']}, seeds {', '.join(map(str, table['seeds']))}")
        print(format_results_table(table["rows"], COLUMNS, DECIMALS))


def measure(runs: list[dict], planned: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Make the runs that are not there yet, each with plain training in its process, as times are compared there."""
    data = "photographs" if options.pictures else "features"

    def key(run: dict) -> tuple:
        return run["method"], run["noise"], run["seed"], run["data"]

    made = {key(run): run["settings"] for run in runs}
    jobs = []
    for condition, seed in planned:
        names = [name for name in options.own_methods if name != PLAIN]
        names = [name for name in names if made.get((name, condition, seed, data)) != options.own_methods[name]]
        if names or (PLAIN, condition, seed, data) not in made:
            jobs.append((condition, seed, [PLAIN, *names], options))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        running = [pool.submit(run, *job) for job in jobs]
        for job in tqdm(as_completed(running), total=len(running), disable=not running):
            new = job.result()
            runs[:] = [run for run in runs if key(run) not in set(map(key, new))] + new
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"set": options.set, "runs": runs, "tables": summarise(runs)}, indent=1)
                options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
