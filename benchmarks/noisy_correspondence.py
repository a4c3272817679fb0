"""What does each method recover of wrong captions? Flickr8k with captions that are exchanged, at random or not.

    python benchmarks/noisy_correspondence.py --data flickr8k --output FILE.json [--workers 2]
    python benchmarks/noisy_correspondence.py --data flickr8k --methods none,gsc --noise 40 --split validation
    python benchmarks/noisy_correspondence.py --data flickr8k --budget time --output FILE.json
    python benchmarks/noisy_correspondence.py --output FILE.json --table
    python benchmarks/noisy_correspondence.py --output FILE.json --write-docs

The folder of the data holds {train,validation,test}.parquet, the image features, caption_order_noise{20,40,60}.npy
and caption_order_neighbours40.npy. A condition is a kind and a percentage of wrong captions: `random` exchanges them
at random, `neighbours` between images that look alike, `partial` replaces one noun, `absent` leaves images out and
gives their captions to the others; a number alone is `random`. The orders that are no files are made by the package,
with seed 0. With `absent`, 71 % (at 40 %) or 62 % (at 60 %) of the images stay, and an epoch has fewer steps: compare
methods with each other, and not with other conditions.

Within one condition and seed all methods share the pairs, the batches, the initial weights and the schedule; `gsc+`
trains a second network beside the first. `oracle` knows the truth: mismatched pairs have no weight. With `--budget
steps`, all make the same number of steps; with `--budget time`, each makes as many as fit into the time of plain
training, scoring charged, by the ratio of the times of a step, which is measured in the same process just before.

`last` is the recall sum after the last step, `averaged` that of the mean of the weights over the last three quarters
of the steps, of the same run; `best` that of the epoch best on validation. `detection` is the AUROC of a method's
own opinion of the pairs (its label, its division or its ranking in the last epoch; of the methods without any, the
correlation under the final weights). `recovered` is the share of what the oracle gains over `none`, in the recall sum
of the last step. Of soft labels, FILE.json also has the median of the matched pairs' and the share that mismatched
pairs have of the sum of all. Runs that FILE.json has are not repeated, but those of earlier versions without averaged
weights are.

`learnability`, `rho`, `jest` and `coreset` compare with a model of the same features, `--reference`, such as the
folder of a run on clean pairs; without it they are left out.

With `--towers captions.npz` (made by `two_towers.py features`), only the projections of a dual encoder train, on
stored features of two pretrained towers: MiniLM, and EfficientNet-lite0 (efficientnet_lite0_features.npz, next to the
data). Give such runs a file of their own.

`--write-docs` writes the tables of README.md, docs/which_method.md and docs/results.md from FILE.json.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from noisy_methods import BY_REFERENCE, CONDITIONS, METHODS, read_condition
from noisy_runs import list_shared_settings, load_recipe, run
from noisy_tables import BUDGETS, ROOT, is_complete, modernise, show, write_docs
from tqdm.auto import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Flickr8k")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; all without it")
    parser.add_argument("--reference", help=f"model or run folder that {', '.join(BY_REFERENCE)} compare with")
    parser.add_argument("--towers", type=Path, help="captions' features by two_towers.py: heads on pretrained towers")
    parser.add_argument("--noise", default=",".join(CONDITIONS), help=f"of {', '.join(CONDITIONS)}; 40 is random40")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of the reported figures")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="steps", help="what all methods have alike")
    parser.add_argument("--timing-rounds", type=int, default=3, help="of --budget time: short runs of each method")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="JSON with all runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the tables of the runs in --output")
    parser.add_argument(
        "--write-docs", type=Path, nargs="?", const=ROOT, metavar="ROOT", help="only write the documents in ROOT"
    )
    options = parser.parse_args()

    runs = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
    runs = modernise(runs)
    reachable = [name for name in METHODS if options.reference or name not in BY_REFERENCE]
    methods = options.methods.split(",") if options.methods else reachable
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose of {', '.join(METHODS)}")
    try:
        conditions = [read_condition(text.strip()) for text in options.noise.split(",")]
    except ValueError as error:
        parser.error(f"--noise: {error}")
    if options.write_docs:
        if not runs:
            parser.error("--write-docs needs --output FILE.json with runs")
        for path in write_docs(runs, options.write_docs):
            print(f"wrote {path}")
        return
    if not options.table:
        if not options.data:
            parser.error("--data is missing: the folder of Flickr8k")
        try:
            for method in methods:
                load_recipe(method, options)
        except ValueError as error:  # before work starts, and with its own words
            parser.error(str(error))
        if outdated := sum(not is_complete(run) for run in runs):
            print(f"{outdated} runs of {options.output} have no averaged weights; those asked for are measured again.")
        measure(runs, [(m, c, int(s)) for s in options.seeds.split(",") for c in conditions for m in methods], options)
    show(runs)


def measure(runs: list[dict], planned: list[tuple[str, str, int]], options: argparse.Namespace) -> None:
    """Make the runs that are not there yet, and write each to the file when it is done."""

    def key(run: dict) -> tuple:
        return run["method"], run["noise"], run["seed"], run["budget"]

    done = {key(run) for run in runs if is_complete(run)}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(run, *job, options) for job in planned if (*job, options.budget) not in done]
        for job in tqdm(as_completed(jobs), total=len(jobs), disable=not jobs):
            made = job.result()
            runs[:] = [run for run in runs if key(run) != key(made)] + [made]
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                settings = [*list_shared_settings(options), *options.set]
                options.output.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
