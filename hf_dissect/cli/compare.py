"""`hf-dissect compare`: one recipe with several strategies and seeds, and one table of the results."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_overwrite, add_recipe_arguments, load_recipe
from hf_dissect.cli.output import announce, is_first_process, quiet_libraries
from hf_dissect.recipe.recipe import Recipe

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Run a recipe with several strategies and seeds and print a table."
EPILOG = """examples:
  hf-dissect compare recipes/quickstart.yaml
  hf-dissect compare quickstart --strategies random,dissect,dissect:momentum --seeds 0,1,2
  hf-dissect compare flickr8k-features data.path=/data/flickr8k --output-dir runs/flickr8k
  hf-dissect compare runs/flickr8k/recipe.yaml       repeat a comparison from its own folder"""
AFTER_INTERRUPT = "The finished runs and their table are in the folder; --resume continues after them."


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "compare", _compare, SUMMARY, EPILOG, AFTER_INTERRUPT)
    add_recipe_arguments(parser)
    parser.add_argument("--strategies", help="comma-separated, as name or name:variant (default: the recipe's)")
    parser.add_argument("--seeds", help="comma-separated integers (default: the recipe's)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that finished before")
    add_overwrite(parser, "an earlier comparison, or with --resume, its runs of other settings,")


def _compare(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    if options.strategies is not None:
        overrides.append(f"compare.strategies={json.dumps([part.strip() for part in options.strategies.split(',')])}")
    if options.seeds is not None:
        overrides.append(f"compare.seeds=[{options.seeds}]")
    recipe = load_recipe(options, overrides, Recipe)
    quiet_libraries()
    from hf_dissect.runs.compare import compare, format_comparison
    from hf_dissect.runs.output_folder import choose_free_output_dir

    recipe = recipe if options.overwrite or options.resume else choose_free_output_dir(recipe, below=True)
    comparison = compare(recipe, resume=options.resume, overwrite=options.overwrite, announce=announce)
    if is_first_process():
        print(f"\n{format_comparison(comparison['table'])}\n")
        folder = Path(recipe.output_dir)
        print(f"report  {folder / 'report.html'}\nfigures {folder / 'metrics.json'}")
