"""Does a modality help that only training has? Settings of UTD-MHAD and Flickr8k, all methods, and what is predicted.

    python benchmarks/distillation.py --utd UTD --flickr FLICKR --output FILE.json [--settings utd-quarter,scenes-300]
    python benchmarks/distillation.py --utd UTD --settings utd-unknown --methods student,amid --seeds 0 --split test
    python benchmarks/distillation.py --output FILE.json --table [--write-docs]

Runs in FILE.json are not repeated. Settings:

- utd, utd-half, utd-quarter, utd-eighth: 27 actions, a student of depth videos, skeleton and inertial sensors in
  training, and the labels of all, one half, a quarter or an eighth of the training recordings; accuracy.
- utd-unknown: no label for every other action; R@1 of these actions, whose gallery are the training recordings.
- scenes-300, scenes-1500: photographs of Flickr8k as features of a MobileNet, captions as features of MiniLM
  (`python benchmarks/two_towers.py features FLICKR FLICKR/captions.npz`), the kind of scene (30 clusters of the
  captions' tf-idf) of 300 or 1,500 of the 6,000 photographs; mean average precision of photographs whose captions are
  alike (tf-idf cosine above 0.35).

`--split validation`, where settings were chosen, leaves out one of UTD's odd subjects, each seed another one;
`--split test` trains on all odd subjects and evaluates the even ones. For one seed all methods start from the same
student and see the same batches. Figures are those after the last step. The teacher of `hinton` and `crd` gets its
task losses alone: that of `mi_student_only` has to be compared with it. `amid without TERM` is the ablation,
and `inputs` what the student reads, without training. `auto` is the pilot of `distillation.method=auto`, which reads
the training rows alone; its row has the figures of the method that it picks.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from distillation_settings import CAPTIONS, SETTINGS
from noisy_tables import put_between
from tqdm.auto import tqdm

from hf_dissect.distillation import METHODS, DistillationRecipe, choose_method
from hf_dissect.runs.distil import build_trainer

ABLATED = ("information_student", "information_auxiliary", "conditional_entropy", "hinton", "teacher_task")
ABLATIONS = {f"amid without {term}": term for term in ABLATED}
MARKER = "distillation"
ALL_METHODS = ("inputs", *METHODS, *ABLATIONS, "auto")


def make_recipe(name: str, method: str, seed: int, options: argparse.Namespace, folder: str) -> DistillationRecipe:
    """Recipe of a setting with a method and a seed."""
    setting, base = SETTINGS[name], "amid" if method in ABLATIONS else method
    changes = [
        *setting.overrides,
        f"distillation.method={base}",
        f"training.seed={seed}",
        f"training.output_dir={folder}",
        "training.eval_strategy='no'",
        "training.disable_tqdm=true",
        "training.use_cpu=true",
        *(change for change in options.set if _concerns(change, base)),
    ]
    if method in ABLATIONS:
        changes.append(f"distillation.term_weights.{ABLATIONS[method]}=0")
    if isinstance(setting.recipe, str):
        changes += ["data.path=arrays", "data.validation_groups=[]", "data.test_groups=[]"]
        return DistillationRecipe.load(setting.recipe, changes)
    return DistillationRecipe.from_dict(setting.recipe, overrides=changes)


def _concerns(change: str, method: str) -> bool:
    """A weight is set for those methods only that have its term."""
    key = change.partition("=")[0]
    term = key.removeprefix("distillation.term_weights.")
    return term == key or (method in METHODS and getattr(METHODS[method], term) > 0)


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> dict:
    """Train and evaluate once."""
    setting = SETTINGS[name]
    splits = setting.read(options.utd if name.startswith("utd") else options.flickr, options.split, seed)
    if method == "inputs":
        figures = setting.score_inputs(splits)
        return {"setting": name, "method": method, "seed": seed, "training_s": 0.0, "figures": figures}
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(name, method, seed, options, folder)
        label = recipe.data.label_column
        trained = dict(splits["train"])
        trained[label] = np.where(setting.keeps_label(trained), trained[label].astype(object), None)
        if method == "auto":
            criterion = choose_method(recipe, {"train": trained})
            return {"setting": name, "method": method, "seed": seed, "criterion": criterion.to_dict()}
        trainer = build_trainer(recipe, {"train": trained})
        trainer.args.save_run_folder = False
        trainer.callback_handler.callbacks = [
            callback
            for callback in trainer.callback_handler.callbacks
            if not isinstance(callback, transformers.PrinterCallback)
        ]
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        figures = setting.score(trainer, splits)
        logs = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    kept = {
        key: value for key, value in logs.items() if key.startswith(("information_", "generator", "discriminator_a"))
    }
    return {"setting": name, "method": method, "seed": seed, "training_s": seconds, "figures": figures, "log": kept}


def markdown(runs: list[dict]) -> str:
    """A table for each setting."""
    return "\n\n".join(
        f"`{name}`\n\n{tabulate(name, [made for made in runs if made['setting'] == name])}"
        for name in SETTINGS
        if any(made["setting"] == name for made in runs)
    )


def tabulate(name: str, runs: list[dict]) -> str:
    """The methods of a setting, with mean and deviation of each figure over the seeds, and what was predicted."""
    decides, predicted = SETTINGS[name].decides, [made for made in runs if made["method"] == "auto"]
    trained = {(made["method"], made["seed"]): made for made in runs if made["method"] != "auto"}
    chosen = [trained.get((made["criterion"]["method"], made["seed"])) for made in predicted]
    columns = {method: [made for (own, _), made in trained.items() if own == method] for method in ALL_METHODS}
    columns["auto"] = [made for made in chosen if made is not None]
    figures = sorted(
        {name for made in trained.values() for name in made["figures"]}, key=lambda name: (name != decides, name)
    )
    lines = [["method", *figures, "seconds", "seeds"], ["---"] + ["---:"] * (len(figures) + 2)]
    for method, own in columns.items():
        cells = [show([made["figures"][figure] for made in own if figure in made["figures"]]) for figure in figures]
        if own:
            lines.append(
                [f"`{method}`", *cells, f"{statistics.mean(made['training_s'] for made in own):.0f}", str(len(own))]
            )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, predict([made["criterion"] for made in predicted])] if predicted else [table])


def predict(criteria: list[dict]) -> str:
    """What the pilots of the seeds measured and picked."""

    def mean(name: str) -> str:
        values = [found[name] for found in criteria if found[name] is not None]
        return f"{statistics.mean(values):.2f}" if values else "not known"

    picks = ", ".join(f"`{found['method']}`" for found in criteria)
    information = (
        f"I(T;S) {mean('information_bound')} to {mean('information_uncapped')}, I(S;Y) {mean('student_label')}"
    )
    return f"Predicted: gain {mean('gain')} nats, {information}, I(A;Y|S) {mean('auxiliaries_label')}: {picks}."


def show(values: list[float]) -> str:
    """Mean and deviation in per cent."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def parse() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utd", type=Path, help="folder of UTD-MHAD's .npz, or the file")
    parser.add_argument("--flickr", type=Path, help=f"folder of Flickr8k, with {CAPTIONS}")
    parser.add_argument("--settings", type=words, default=list(SETTINGS))
    parser.add_argument("--methods", type=words, default=list(ALL_METHODS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change the recipes")
    parser.add_argument("--output", type=Path, help="JSON with all runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the tables of the runs in --output")
    parser.add_argument("--write-docs", action="store_true", help="write the tables to docs/results.md as well")
    options = parser.parse_args()
    for given, allowed, name in ((options.settings, SETTINGS, "settings"), (options.methods, ALL_METHODS, "methods")):
        if unknown := set(given) - {*allowed}:
            parser.error(f"--{name} {','.join(sorted(unknown))}: there are {', '.join(allowed)}")
    for setting in () if options.table else options.settings:
        needed = "utd" if setting.startswith("utd") else "flickr"
        if getattr(options, needed) is None:
            parser.error(f"--{needed} is missing: the folder of the data of {setting}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    content = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    runs = content.get("runs", [])
    done = {(made["setting"], made["method"], made["seed"]) for made in runs}
    jobs = [
        (setting, method, seed)
        for setting in options.settings
        for seed in options.seeds
        for method in options.methods
        if not options.table
        and (setting, method, seed) not in done
        and (method != "inputs" or SETTINGS[setting].score_inputs)
    ]
    for job in tqdm(jobs, "runs", disable=not jobs):
        runs.append(run(*job, options))
        made = runs[-1].get("figures") or {"sentence": runs[-1]["criterion"]["sentence"]}
        tqdm.write(f"{', '.join(map(str, job))}: {made}")
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            content = {"split": options.split, "set": options.set, "torch": torch.__version__, "runs": runs}
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(runs))
    if options.write_docs:
        page = Path(__file__).parents[1] / "docs" / "results.md"
        page.write_text(put_between(page.read_text(encoding="utf-8"), MARKER, markdown(runs)), encoding="utf-8")


if __name__ == "__main__":
    main()
