"""The `hf-dissect` command: train, evaluate and compare from recipes."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_dissect.commands import audit, push, push_ledger
from hf_dissect.commands.process import is_first_process, not_negative, positive, quiet_libraries
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.launch_configs import read_summary, shipped_launch_configs
from hf_dissect.recipe import Recipe, RecipeError, load_settings, read_description, shipped_recipes
from hf_dissect.version import __version__

EPILOGS = {
    "train": """examples:
  hf-dissect train recipes/quickstart.yaml
  hf-dissect train quickstart selection.ratio=0.3 training.num_train_epochs=20
  hf-dissect train flickr8k-local data.path=/data/flickr8k
  hf-dissect train runs/quickstart/recipe.yaml       repeat a run from its own folder
  hf-dissect train quickstart --resume               continue from the last checkpoint
  hf-dissect train hub:ada/mine                      repeat a run that was published
  accelerate launch -m hf_dissect.cli train cc3m     several GPUs; see hf-dissect recipes --accelerate""",
    "evaluate": """examples:
  hf-dissect evaluate runs/quickstart                the data of the run's own recipe
  hf-dissect evaluate runs/x --data /data/flickr8k --split test
  hf-dissect evaluate hub:ada/mine                   a published run, on the data of its recipe
  hf-dissect evaluate openai/clip-vit-base-patch32 --data /data/pets --classes cat,dog --label-column species""",
    "compare": """examples:
  hf-dissect compare recipes/quickstart.yaml
  hf-dissect compare quickstart --strategies random,dissect,dissect:momentum --seeds 0,1,2
  hf-dissect compare flickr8k-features data.path=/data/flickr8k --output-dir runs/flickr8k
  hf-dissect compare runs/flickr8k/recipe.yaml       repeat a comparison from its own folder""",
    "recipes": """examples:
  hf-dissect recipes
  hf-dissect recipes quickstart > mine.yaml          a copy to change
  hf-dissect recipes --accelerate                    ways to use several GPUs or machines
  hf-dissect recipes --accelerate multi-gpu > multi-gpu.yaml""",
}
FIGURES = {
    "recall_sum": "recall sum",
    "zero_shot_accuracy@1": "zero-shot top-1 accuracy",
    "zero_shot_accuracy@5": "zero-shot top-5 accuracy",
    "noise_detection_auroc": "noise detection AUROC",
    "noise_detection_average_precision": "noise detection average precision",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for settings or data that cannot work."""
    options = _parse(arguments)
    level = logging.WARNING if is_first_process() else logging.ERROR  # each process would say the same
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.after_interrupt}".rstrip(), file=sys.stderr)
        return 130
    except SystemExit as stop:  # StoppedBySignal, after a checkpoint
        print(f"\nhf-dissect: {stop} {options.after_interrupt}".rstrip(), file=sys.stderr)
        return stop.code
    except Exception as error:
        if options.debug or not _is_for_the_user(error):
            raise
        print(f"hf-dissect: {error}", file=sys.stderr)
        return 2
    _leave_process_group()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; settings may stand before or behind options, which argparse by itself does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [part for part in rest if part.startswith("-") or "=" not in part or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error names what to change; anything else is a fault of the program and keeps its traceback."""
    if isinstance(error, RecipeError | FileNotFoundError | ValueError):
        return True
    # Not imported at the top: the recipe commands must not wait for torch.
    from hf_dissect.data.bad_rows import TooManyBadRows
    from hf_dissect.interruption import DataWorkerDied
    from hf_dissect.trainer import NonFiniteLossError

    # ImportError: a setting that needs a package which is not there, such as a tracker or an optimiser.
    return isinstance(error, TooManyBadRows | NonFiniteLossError | DataWorkerDied | OSError | ImportError)


def _train(options: argparse.Namespace) -> None:
    if not is_hub_address(options.recipe) and "distillation" in load_settings(options.recipe)[0]:
        _distil(options)
        return
    recipe = _recipe(options, options.overrides)
    quiet_libraries()
    from hf_dissect.run_recipe import free_output_dir, run_recipe

    recipe = _with_output_dir(recipe, options.output_dir)
    recipe = recipe if options.resume else free_output_dir(recipe)
    metrics = run_recipe(recipe, resume=options.resume)
    if is_first_process():
        print(f"\n{_retrieval_table(metrics['final'])}\n")
        _print_selection(metrics)
        print(f"model   {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _distil(options: argparse.Namespace) -> None:
    quiet_libraries()
    from hf_dissect.distillation.recipe import DistillationRecipe
    from hf_dissect.distillation.run_folder import figures_table
    from hf_dissect.distillation.run_recipe import run_distillation
    from hf_dissect.run_recipe import free_output_dir

    recipe = _with_output_dir(DistillationRecipe.load(options.recipe, options.overrides), options.output_dir)
    recipe = recipe if options.resume else free_output_dir(recipe)
    metrics = run_distillation(recipe, resume=options.resume)
    if is_first_process():
        print(f"\n{figures_table(metrics)}\n")
        print(f"student {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    quiet_libraries()
    from hf_dissect.evaluate_checkpoint import DEFAULT_TEMPLATES, evaluate_checkpoint

    figures = evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        split=options.split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        task_column=options.task_column,
        label_column=options.label_column,
        classes=_names(options.classes),
        templates=options.template or DEFAULT_TEMPLATES,
        image_features=options.image_features,
        max_rows=options.max_rows,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    if not is_first_process():
        return
    print(_retrieval_table(figures))
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _compare(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    if options.strategies is not None:
        overrides.append(f"compare.strategies={json.dumps([part.strip() for part in options.strategies.split(',')])}")
    if options.seeds is not None:
        overrides.append(f"compare.seeds=[{options.seeds}]")
    recipe = _recipe(options, overrides)
    quiet_libraries()
    from hf_dissect.compare import TABLE_COLUMNS, TABLE_DECIMALS, TABLE_LEGEND, compare
    from hf_dissect.evaluation import format_results_table
    from hf_dissect.run_recipe import free_output_dir

    recipe = _with_output_dir(recipe, options.output_dir)
    recipe = recipe if options.overwrite or options.resume else free_output_dir(recipe)
    comparison = compare(recipe, resume=options.resume, announce=_announce)
    if not is_first_process():
        return
    known = {
        key: name for key, name in TABLE_COLUMNS.items() if any(_has(row.get(key)) for row in comparison["table"])
    }
    print(f"\n{format_results_table(comparison['table'], known, TABLE_DECIMALS)}\n\n{TABLE_LEGEND}\n")
    print(f"report  {Path(recipe.output_dir) / 'report.html'}\nfigures {Path(recipe.output_dir) / 'metrics.json'}")


def _recipes(options: argparse.Namespace) -> None:
    if options.accelerate:
        kind, shipped, describe = "accelerate configuration", shipped_launch_configs(), read_summary
    else:
        kind, shipped, describe = "recipe", shipped_recipes(), read_description
    if options.name is not None:
        if options.name not in shipped:
            raise RecipeError(options.name, [f"no such {kind}; shipped are {', '.join(shipped)}"])
        print(shipped[options.name].read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:{width}}  {describe(path)}")


def _recipe(options: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    if not is_hub_address(options.recipe):
        return Recipe.load(options.recipe, overrides)
    from hf_dissect.hub.pull import pull_recipe

    return pull_recipe(HubAddress.parse(options.recipe), overrides, options.output_dir)


def _with_output_dir(recipe: Recipe, output_dir: str | None) -> Recipe:
    from hf_dissect.run_recipe import in_folder

    return recipe if output_dir is None else in_folder(recipe, output_dir)


def _announce(text: str) -> None:
    if is_first_process():
        print(f"\n{text}", flush=True)


def _retrieval_table(figures: dict) -> str:
    from hf_dissect.evaluation import format_results_table

    rows = []
    for name, direction in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
        keys = {f"R@{k}": f"{direction}_R@{k}" for k in (1, 5, 10)} | {"median rank": f"{direction}_median_rank"}
        if f"{direction}_R@1" in figures:
            rows.append({"retrieval": name, **{heading: figures[key] for heading, key in keys.items()}})
    parts = [format_results_table(rows, list(rows[0]), decimals=1)] if rows else []
    known = {name: figures[key] for key, name in FIGURES.items() if figures.get(key) is not None}
    if known:
        width = max(map(len, known))
        parts.append("\n".join(f"{name:{width}}  {value:.4g}" for name, value in known.items()))
    return "\n\n".join(parts) or "Nothing was evaluated: there is no validation or test split."


def _print_selection(metrics: dict) -> None:
    times, selection = metrics["times"], metrics["selection"]
    print(
        f"{metrics['strategy']}: {metrics['steps']} steps, {selection['kept_share']:.0%} of the candidates trained; "
        f"{times['data_s']:.0f} s data, {times['scoring_s']:.0f} s scoring, {times['training_s']:.0f} s training"
    )
    if metrics["bad_rows"]["count"]:
        print(
            f"{metrics['bad_rows']['count']} rows could not be read and were skipped; see metrics.json for their ids"
        )


def _has(value: object) -> bool:
    return value is not None and not (isinstance(value, dict) and value.get("mean") is None)


def _names(text: str | None) -> list[str] | None:
    """Class names from a comma-separated list or a file with one a line."""
    if text is None:
        return None
    if os.path.isfile(text):  # unlike Path.is_file no error for a list longer than a file name may be
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def _leave_process_group() -> None:
    """What torch asks for at the end of a process that trained together with others."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # the first process writes more than the others; who leaves before it may be aborted
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dissect", description="Train CLIP-like models on the image-text pairs that are worth a gradient."
    )
    parser.add_argument("--version", action="version", version=f"hf-dissect {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        part = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EPILOGS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        part.set_defaults(run=run, after_interrupt="")
        part.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return part

    train = command("train", _train, "Train a model as a recipe says.")
    compare = command("compare", _compare, "Run a recipe with several strategies and seeds and print a table.")
    for part in (train, compare):
        part.add_argument("recipe", help="YAML file, name of a shipped recipe, or hub:USER/REPO")
        part.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
        part.add_argument("--output-dir", help="run folder (default: runs/<name of the recipe>)")
    train.set_defaults(after_interrupt="If a checkpoint was written, --resume continues from it.")
    compare.set_defaults(after_interrupt="The runs that were done, and their table, stand in the folder.")
    train.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    compare.add_argument("--strategies", help="comma-separated, as name or name:variant (default: the recipe's)")
    compare.add_argument("--resume", action="store_true", help="take over the runs that finished before")
    compare.add_argument("--seeds", help="comma-separated integers (default: the recipe's)")
    compare.add_argument(
        "--overwrite", action="store_true", help="write over an earlier comparison instead of into a new folder"
    )

    evaluate = command("evaluate", _evaluate, "Retrieval and zero-shot figures of a saved model.")
    evaluate.add_argument("checkpoint", help="run folder, checkpoint folder, Hub id or hub:USER/REPO")
    evaluate.add_argument("--data", help="folder, file, .tar shards, Hub data set id or scenes (default: the run's)")
    evaluate.add_argument("--split", default="test", help="split of the data (default: test)")
    evaluate.add_argument("--image-column", help="column of the images")
    evaluate.add_argument("--caption-column", help="column of the captions")
    evaluate.add_argument("--task-column", help="column of the tasks, for a MoLA adapter of variant grad")
    evaluate.add_argument("--label-column", default="label", help="column of the labels (default: label)")
    evaluate.add_argument("--classes", help="class names: comma-separated, or a file with one a line")
    evaluate.add_argument("--template", action="append", help="caption of a class, {} is its name; may be repeated")
    evaluate.add_argument("--image-features", help=".npz of stored features, for models that read those")
    evaluate.add_argument("--max-rows", type=positive, help="evaluate the first rows only")
    evaluate.add_argument("--batch-size", type=positive, default=64, help="pairs a forward pass (default: 64)")
    evaluate.add_argument("--num-workers", type=not_negative, default=0, help="processes that decode (default: 0)")
    evaluate.add_argument("--output", help="also write the figures to this JSON file")

    audit.add_parser(commands)

    recipes = command("recipes", _recipes, "List the shipped recipes or accelerate configurations, or print one.")
    recipes.add_argument("name", nargs="?", help="print this one instead of the list")
    recipes.add_argument(
        "--accelerate", action="store_true", help="the configurations of accelerate launch instead of the recipes"
    )
    push.add_parser(commands)
    push_ledger.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
