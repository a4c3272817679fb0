"""Does a student of depth videos gain from skeletons and inertial sensors that only training has? UTD-MHAD.

    python benchmarks/amid_utd_mhad.py --data UTD [--seeds 0,1,2,3,4] [--split validation] [--output F.json]
    python benchmarks/amid_utd_mhad.py --data UTD --methods student,amid --seeds 0 --set training.num_train_epochs=10
    python benchmarks/amid_utd_mhad.py --data UTD --labelled-trials 1     labels for one in four training rows
    python benchmarks/amid_utd_mhad.py --output F.json --table            only print what is there

Runs in F.json are not repeated, so that several calls can share it, one after the other.

UTD is a folder with one .npz (see recipes/amid-utd-mhad.yaml, of which this uses networks and settings). Settings were
chosen on the odd subjects, of which one was left out at a time: --split validation leaves out 7, and with it
--set data.train_groups=[1,3,7] --set data.validation_groups=[5] another. --split test trains on all odd subjects and
tests on the even ones. For one seed all methods start from the same student and see the same batches. The figures are
those after the last step.

- accuracy of the student, of the teacher that trained next to it, and of the auxiliaries;
- R@1: the share of test rows whose nearest training row, by the student's features, is of their class (no subject is
  on both sides); `R@1 within` looks among the other test rows, where others of the same subject make it easy;
- `amid without TERM`: the ablation;
- in the JSON, after training, on all training rows and on all test rows: the bounds on I(T;S) and I(T;A) with all of
  them as candidates (log N is the most that a bound can say), and the generator's squared error (1 is the error of
  knowing nothing).

With `--labelled-trials N` only the first N of four recordings of each action by each subject keep their label; of the
others, the terms that need none learn all the same.

The teacher of "hinton" and "crd" gets its task losses alone: it is the upper bound, and what that of "mi_student_only"
has to be compared with.
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

from hf_dissect.distillation import METHODS, DistillationRecipe, DistillationTrainer, recall_at_1
from hf_dissect.distillation.losses.conditional_entropy import anchor_loss
from hf_dissect.distillation.losses.mutual_information import information_loss
from hf_dissect.distillation.training_data import ModalityRows
from hf_dissect.runs.distil import build_trainer, load_columns

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
        if options.labelled_trials is not None:
            _take_labels(splits["train"], options.labelled_trials)
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
        for split, rows in (("train", splits["train"]), ("test", splits["validation"])):
            diagnostics |= {f"{name}_{split}_rows": value for name, value in known_of_teacher(trainer, rows).items()}
    kept = {name: figures[key] for name, key in FIGURES.items() if key in figures}
    return {"method": method, "seed": seed, "training_s": seconds, **kept, "diagnostics": diagnostics}


def _take_labels(columns: dict, labelled_trials: int) -> None:
    keeps = columns["trial"] <= labelled_trials
    columns["action"] = np.where(keeps, columns["action"].astype(object), None)


@torch.no_grad()
def known_of_teacher(trainer: DistillationTrainer, columns: dict) -> dict[str, float]:
    """How much student and auxiliaries tell of the teacher's features over all rows of a set."""
    trainer.model.eval()
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in trainer.get_eval_dataloader(
        ModalityRows(columns, trainer.modalities, "action", labels=trainer.labels)
    ):
        for name, values in trainer.model(batch["inputs"]).items():
            if name.startswith("compared_") or name in ("generated", "real"):
                parts.setdefault(name, []).append(values)
    found = {name: torch.cat(values, dim=int(name.startswith("compared_"))) for name, values in parts.items()}
    counted = torch.ones(len(columns["action"]), dtype=torch.bool)
    bounds = {
        name: information_loss(values, counted, trainer.args.temperature).bound.item()
        for name, values in found.items()
        if name.startswith("compared_")
    }
    figures = {name.replace("compared_", "information_"): bound for name, bound in bounds.items()}
    if "generated" in found:
        figures["generator_error"] = anchor_loss(found["generated"], found["real"], counted).item()
    return figures


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
        names = dict.fromkeys(name for run in own for name in run["diagnostics"])
        table[method]["diagnostics"] = {
            name: statistics.mean(run["diagnostics"][name] for run in own if name in run["diagnostics"])
            for name in names
        }
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
    parser.add_argument("--data", type=Path, help="folder of the .npz, or the file")
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
    parser.add_argument("--labelled-trials", type=int, choices=(1, 2, 3), help="recordings that keep their label")
    parser.add_argument("--output", type=Path, help="JSON with all runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs in --output")
    options = parser.parse_args()
    if options.data is None and not options.table:
        parser.error("--data is missing: the folder of UTD-MHAD")
    if unknown := set(options.methods) - {*METHODS, *ABLATIONS}:
        parser.error(f"--methods {','.join(sorted(unknown))}: there are {', '.join([*METHODS, *ABLATIONS])}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    runs = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
    done = {(run["method"], run["seed"]) for run in runs}
    planned = [] if options.table else [(method, seed) for seed in options.seeds for method in options.methods]
    for method, seed in [job for job in planned if job not in done]:
        runs.append(run(method, seed, options))
        shown = ", ".join(f"{name} {100 * runs[-1][name]:.1f}" for name in FIGURES if name in runs[-1])
        print(f"{method}, seed {seed}: {shown} ({runs[-1]['training_s']:.0f} s)", flush=True)
        if options.output:
            write(runs, options)
    print(markdown(summarise(runs)))


def write(runs: list[dict], options: argparse.Namespace) -> None:
    settings = recipe_of("amid", 0, options, "run").to_dict()
    del settings["data"]["path"]
    results = {"split": options.split, "labelled_trials": options.labelled_trials, "torch": torch.__version__}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results |= {"recipe": settings, "methods": summarise(runs), "runs": runs}
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
