"""Does a student of depth videos gain from skeletons and inertial sensors that only training has? UTD-MHAD.

    python benchmarks/amid_utd_mhad.py --data UTD [--seeds 0,1,2,3,4] [--split validation] [--output F.json]
    python benchmarks/amid_utd_mhad.py --data UTD --methods student,amid --seeds 0 --set training.num_train_epochs=10

UTD is a folder with one .npz (see recipes/amid-utd-mhad.yaml, of which this uses networks and settings). Settings are
chosen on subject 7, held out of the odd ones (--split validation); --split test trains on all odd subjects and tests
on the even ones. For one seed all methods start from the same student and see the same batches. The figures are those
after the last step.

- accuracy of the student, of the teacher that trained beside it, and of the auxiliaries;
- R@1: the share of test rows whose nearest training row, by the student's features, is of their class (no subject is
  on both sides); `R@1 within` looks among the other test rows, where others of the same subject make it easy;
- `amid without TERM`: the ablation.

The teacher of "hinton" and "crd" gets its task losses alone: it is the upper bound, and what that of "mi_student_only"
has to be compared with.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from results_file import show_and_write

from hf_dissect.distillation import METHODS, DistillationRecipe, recall_at_1
from hf_dissect.distillation.run_recipe import build_trainer, load_columns

SPLITS = {"validation": ([1, 3, 5], [7]), "test": ([1, 3, 5, 7], [2, 4, 6, 8])}
ABLATED = ("information_student", "information_auxiliary", "conditional_entropy", "teacher_task", "auxiliary_task")
ABLATIONS = {f"amid without {term}": term for term in ABLATED}
FIGURES = {
    "student": "student_accuracy",
    "R@1": "retrieval_R@1_train_gallery",
    "R@1 within": "retrieval_R@1",
    "teacher": "teacher_accuracy",
    "skeleton": "auxiliary_skeleton_accuracy",
    "inertial": "auxiliary_inertial_accuracy",
}


def recipe_of(method: str, seed: int, options: argparse.Namespace, folder: str) -> DistillationRecipe:
    """The shipped recipe with a method, a seed and the groups of the split."""
    train, tested = SPLITS[options.split]
    base = "amid" if method in ABLATIONS else method
    settings = [
        f"data.path={json.dumps(str(options.data))}",
        f"data.train_groups={train}",
        f"data.validation_groups={tested}",
        "data.test_groups=[]",
        f"distillation.method={base}",
        f"training.seed={seed}",
        f"training.output_dir={folder}",
        "training.eval_strategy='no'",
        "training.disable_tqdm=true",
        "training.use_cpu=true",
        *(setting for setting in options.set if _concerns(setting, base)),
    ]
    if method in ABLATIONS:
        settings.append(f"distillation.term_weights.{ABLATIONS[method]}=0")
    return DistillationRecipe.load("amid-utd-mhad", settings)


def _concerns(setting: str, method: str) -> bool:
    """A weight is set for those methods only that have its term."""
    key = setting.partition("=")[0]
    term = key.removeprefix("distillation.term_weights.")
    return term == key or getattr(METHODS[method], term) > 0


def run(method: str, seed: int, options: argparse.Namespace) -> dict:
    """Train and evaluate once."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(method, seed, options, folder)
        splits = load_columns(recipe.data)
        trainer = build_trainer(recipe, splits)
        trainer.args.save_run_folder = False
        trainer.callback_handler.callbacks = [
            callback
            for callback in trainer.callback_handler.callbacks
            if not isinstance(callback, transformers.PrinterCallback)
        ]
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        figures = trainer.evaluate()
        figures = {name.removeprefix("eval_"): value for name, value in figures.items()}
        gallery = trainer.embed(splits["train"])
        figures["retrieval_R@1_train_gallery"] = recall_at_1(*trainer.embed(splits["validation"]), *gallery)
        logs = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
        diagnostics = {name: value for name, value in logs.items() if name.startswith(("information_", "discrim"))}
    kept = {name: figures[key] for name, key in FIGURES.items() if key in figures}
    return {"method": method, "seed": seed, "training_s": seconds, **kept, "diagnostics": diagnostics}


def summarise(runs: list[dict]) -> dict[str, dict]:
    """Mean and sample standard deviation over the seeds, by method and figure."""
    table: dict[str, dict] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        table[method] = {}
        for name in FIGURES:
            if values := [run[name] for run in own if name in run]:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                table[method][name] = {"mean": statistics.mean(values), "deviation": deviation}
        table[method]["training_s"] = statistics.mean(run["training_s"] for run in own)
    return table


def markdown(table: dict[str, dict]) -> str:
    lines = [["method", *FIGURES, "seconds"], ["---"] + ["---:"] * (len(FIGURES) + 1)]
    for method, row in table.items():
        cells = [method]
        for name in FIGURES:
            value = row.get(name)
            spread = "" if value is None or value["deviation"] is None else f" ± {100 * value['deviation']:.1f}"
            cells.append("-" if value is None else f"{100 * value['mean']:.1f}{spread}")
        lines.append([*cells, f"{row['training_s']:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="validation", choices=tuple(SPLITS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*METHODS, *ABLATIONS])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="of the recipe; distillation.term_weights.TERM concerns the methods that have the term",
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if unknown := set(options.methods) - {*METHODS, *ABLATIONS}:
        parser.error(f"--methods {','.join(sorted(unknown))}: there are {', '.join([*METHODS, *ABLATIONS])}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        for method in options.methods:
            runs.append(run(method, seed, options))
            shown = ", ".join(f"{name} {100 * runs[-1][name]:.1f}" for name in FIGURES if name in runs[-1])
            print(f"{method}, seed {seed}: {shown} ({runs[-1]['training_s']:.0f} s)", flush=True)
    table = summarise(runs)
    print(markdown(table))
    if options.output:
        settings = recipe_of("amid", 0, options, "run").to_dict()
        del settings["data"]["path"]
        results = {"split": options.split, "torch": torch.__version__, "recipe": settings}
        show_and_write(results | {"methods": table, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
