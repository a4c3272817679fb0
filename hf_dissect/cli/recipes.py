"""`hf-dissect recipes`: the recipes and accelerate configurations that come with the package."""

import argparse
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command
from hf_dissect.recipe.file import read_description, shipped_recipes
from hf_dissect.recipe.launch_configs import read_summary, shipped_launch_configs
from hf_dissect.recipe.recipe import RecipeError

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "List the shipped recipes or accelerate configurations, or print one."
EPILOG = """examples:
  hf-dissect recipes
  hf-dissect recipes quickstart > mine.yaml          a copy to change
  hf-dissect recipes --accelerate                    ways to use several GPUs or machines
  hf-dissect recipes --accelerate multi-gpu > multi-gpu.yaml"""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "recipes", _list_recipes, SUMMARY, EPILOG)
    parser.add_argument("name", nargs="?", help="print this one instead of the list")
    parser.add_argument(
        "--accelerate", action="store_true", help="the configurations of accelerate launch instead of the recipes"
    )


def _list_recipes(options: argparse.Namespace) -> None:
    if options.accelerate:
        kind, shipped, describe = "accelerate configuration", shipped_launch_configs(), read_summary
    else:
        kind, shipped, describe = "recipe", shipped_recipes(), read_description
    if options.name is None:
        width = max(map(len, shipped))
        for name, path in shipped.items():
            print(f"{name:{width}}  {describe(path)}")
    elif options.name in shipped:
        print(shipped[options.name].read_text(encoding="utf-8"), end="")
    else:
        raise RecipeError(options.name, [f"no such {kind}; shipped are {', '.join(shipped)}"])
