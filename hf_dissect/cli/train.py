"""`hf-dissect train`: carries out a recipe, with sample selection or as a distillation."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dissect.cli.options import add_command, add_overwrite, add_recipe_arguments, load_recipe
from hf_dissect.cli.output import announce, is_first_process, quiet_libraries
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.recipe.file import load_settings
from hf_dissect.recipe.recipe import Recipe

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Train a model as a recipe says."
EPILOG = """examples:
  hf-dissect train recipes/quickstart.yaml
  hf-dissect train quickstart selection.ratio=0.3 training.num_train_epochs=20
  hf-dissect train flickr8k-local data.path=/data/flickr8k
  hf-dissect train amid-clip data.path=/data/birds   a student that learns from captions, which only training has
  hf-dissect train runs/quickstart/recipe.yaml       repeat a run from its own folder
  hf-dissect train quickstart --resume               continue from the last checkpoint
  hf-dissect train hub:ada/mine                      repeat a run that was published
  accelerate launch -m hf_dissect.cli train cc3m     several GPUs; see hf-dissect recipes --accelerate"""
AFTER_INTERRUPT = "If a checkpoint was written, --resume continues from it."


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "train", _train, SUMMARY, EPILOG, AFTER_INTERRUPT)
    add_recipe_arguments(parser)
    given_folder = parser.add_mutually_exclusive_group()
    given_folder.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    add_overwrite(given_folder, "an earlier run or model")


def _train(options: argparse.Namespace) -> None:
    recipe = load_recipe(options, options.overrides, choose_kind(options.recipe))
    train(recipe, resume=options.resume, overwrite=options.overwrite)


def choose_kind(recipe: str) -> type[Any]:
    """Return the class of the recipe that a command line names: `Recipe` or `DistillationRecipe`."""
    if not _is_distillation(recipe):
        return Recipe
    quiet_libraries()
    from hf_dissect.distillation.recipe import DistillationRecipe

    return DistillationRecipe


def train(recipe: Any, *, resume: bool = False, overwrite: bool = False) -> None:
    """Carry out a recipe of either kind and print its figures.

    Args:
        recipe: Checked recipe; without `resume` and `overwrite`, a folder that is taken is replaced by a free one.
        resume: True to continue from the last checkpoint of the run folder.
        overwrite: True to write over an earlier run.
    """
    quiet_libraries()
    from hf_dissect.runs.output_folder import choose_free_output_dir

    recipe = recipe if resume or overwrite else choose_free_output_dir(recipe)
    if not isinstance(recipe, Recipe):
        _distil(recipe, resume, overwrite)
        return
    from hf_dissect.evaluation.tables import format_retrieval
    from hf_dissect.runs.run import run_recipe

    metrics = run_recipe(recipe, resume=resume, overwrite=overwrite)
    if is_first_process():
        print(f"\n{format_retrieval(metrics['final'])}\n")
        _print_selection(metrics)
        print(f"model   {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _distil(recipe: Any, resume: bool, overwrite: bool) -> None:
    from hf_dissect.evaluation.tables import format_distillation
    from hf_dissect.runs.distil import run_distillation

    metrics = run_distillation(recipe, resume=resume, overwrite=overwrite, announce=announce)
    if is_first_process():
        print(f"\n{format_distillation(metrics['final'], metrics['method'])}\n")
        for when, criterion in metrics.get("information", {}).items():
            if when != "choice":
                print(f"{when} training: {criterion['sentence']}")
        print(f"student {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _is_distillation(recipe: str) -> bool:
    if not is_hub_address(recipe):
        return "distillation" in load_settings(recipe)[0]
    from hf_dissect.hub.pull import pull_settings

    return "distillation" in pull_settings(HubAddress.parse(recipe))


def _print_selection(metrics: dict[str, Any]) -> None:
    from hf_dissect.report.tables import list_skipped_shards

    times, selection = metrics["times"], metrics["selection"]
    print(
        f"{metrics['strategy']}: {metrics['steps']} steps, {selection['kept_share']:.0%} of the candidates trained; "
        f"{times['data_s']:.0f} s data, {times['scoring_s']:.0f} s scoring, {times['training_s']:.0f} s training"
    )
    if count := metrics["bad_rows"]["count"]:
        print(f"{count} rows could not be read and were skipped; see metrics.json for their ids and what is wrong")
    for split, part in list_skipped_shards(metrics).items():
        print(
            f"{part['count']} shards of the split {split} were not read to their end; see metrics.json for their names"
        )
