"""`hf-dissect train`: a run as a recipe says, be it a selection's or a distillation's."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_dissect.cli.evaluate import retrieval_table
from hf_dissect.cli.process import add_command, is_first_process, quiet_libraries
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.recipe.file import load_settings
from hf_dissect.recipe.recipe import Recipe

if TYPE_CHECKING:
    from hf_dissect.distillation.recipe import DistillationRecipe

SUMMARY = "Train a model as a recipe says."
EPILOG = """examples:
  hf-dissect train recipes/quickstart.yaml
  hf-dissect train quickstart selection.ratio=0.3 training.num_train_epochs=20
  hf-dissect train flickr8k-local data.path=/data/flickr8k
  hf-dissect train amid-clip data.path=/data/birds   a student that learns with captions, which only training has
  hf-dissect train runs/quickstart/recipe.yaml       repeat a run from its own folder
  hf-dissect train quickstart --resume               continue from the last checkpoint
  hf-dissect train hub:ada/mine                      repeat a run that was published
  accelerate launch -m hf_dissect.cli train cc3m     several GPUs; see hf-dissect recipes --accelerate"""

_AnyRecipe = TypeVar("_AnyRecipe", Recipe, "DistillationRecipe")


def add_parser(subparsers) -> None:
    """Add the command to those of `hf-dissect`."""
    told = "If a checkpoint was written, --resume continues from it."
    parser = add_command(subparsers, "train", _train, SUMMARY, EPILOG, told)
    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, and where to."""
    parser.add_argument("recipe", help="YAML file, name of a shipped recipe, or hub:USER/REPO")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--output-dir", help="run folder (default: runs/<name of the recipe>)")


def recipe_of_options(
    options: argparse.Namespace, overrides: Sequence[str], kind: type[_AnyRecipe] = Recipe
) -> _AnyRecipe:
    """The checked recipe that the options name, from this machine or the Hub (`RecipeError`, `HubError`)."""
    if is_hub_address(options.recipe):
        from hf_dissect.hub.pull import pull_recipe

        return pull_recipe(HubAddress.parse(options.recipe), overrides, options.output_dir, kind=kind)
    recipe = kind.load(options.recipe, overrides)
    if options.output_dir is None:
        return recipe
    from hf_dissect.runs.run import in_folder

    return in_folder(recipe, options.output_dir)


def _train(options: argparse.Namespace) -> None:
    if _is_of_a_distillation(options.recipe):
        _distil(options)
        return
    recipe = recipe_of_options(options, options.overrides)
    quiet_libraries()
    from hf_dissect.runs.run import free_output_dir, run_recipe

    recipe = recipe if options.resume else free_output_dir(recipe)
    metrics = run_recipe(recipe, resume=options.resume)
    if is_first_process():
        print(f"\n{retrieval_table(metrics['final'])}\n")
        _print_selection(metrics)
        print(f"model   {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _distil(options: argparse.Namespace) -> None:
    quiet_libraries()
    from hf_dissect.distillation.recipe import DistillationRecipe
    from hf_dissect.distillation.summary import figures_table
    from hf_dissect.runs.distil import run_distillation
    from hf_dissect.runs.run import free_output_dir

    recipe = recipe_of_options(options, options.overrides, DistillationRecipe)
    recipe = recipe if options.resume else free_output_dir(recipe)
    metrics = run_distillation(recipe, resume=options.resume)
    if is_first_process():
        print(f"\n{figures_table(metrics['final'], metrics['method'])}\n")
        print(f"student {recipe.output_dir}\nreport  {Path(recipe.output_dir) / 'report.html'}")


def _is_of_a_distillation(recipe: str) -> bool:
    if not is_hub_address(recipe):
        return "distillation" in load_settings(recipe)[0]
    from hf_dissect.hub.pull import pull_settings

    return "distillation" in pull_settings(HubAddress.parse(recipe))


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
