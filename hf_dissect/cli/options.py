"""Builds the parsers of the commands, with the arguments that several commands take."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.recipe.file import RecipeFile

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_AnyRecipe = TypeVar("_AnyRecipe", bound=RecipeFile)


def add_command(
    commands: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    epilog: str,
    after_interrupt: str = "",
) -> argparse.ArgumentParser:
    """Add a command to `hf-dissect`.

    Args:
        commands: commands of the parser of `hf-dissect`.
        name: name of the command.
        run: function that carries the command out.
        summary: one line that says what the command does.
        epilog: examples, printed as they are.
        after_interrupt: sentence printed after an interrupt, that says how to continue.

    Returns:
        The parser of the command.
    """
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, after_interrupt=after_interrupt)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recipe, the settings to change in it, and the run folder."""
    parser.add_argument("recipe", help="YAML file, name of a shipped recipe, or hub:USER/REPO")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--output-dir", help="run folder (default: runs/<name of the recipe>)")


def add_overwrite(parser: "argparse._ActionsContainer", what: str) -> None:
    """Add the option `--overwrite`; `what` is that which is written over."""
    text = f"write over {what} in the folder instead of into a new folder; other files stay"
    parser.add_argument("--overwrite", action="store_true", help=text)


def load_recipe(options: argparse.Namespace, overrides: Sequence[str], kind: type[_AnyRecipe]) -> _AnyRecipe:
    """Load and check the recipe that the options name, from this machine or from the Hub.

    Args:
        options: options of a command with the arguments of `add_recipe_arguments`.
        overrides: `section.key=value`, the settings to change.
        kind: `Recipe`, or `DistillationRecipe` for a distillation.

    Raises:
        HubError: there is no such repository, it has no recipe, or it cannot be reached.
        RecipeError: the recipe has faults.
    """
    if is_hub_address(options.recipe):
        from hf_dissect.hub.pull import pull_recipe

        return pull_recipe(HubAddress.parse(options.recipe), overrides, options.output_dir, kind=kind)
    recipe = kind.load(options.recipe, overrides)
    if options.output_dir is None:
        return recipe
    from hf_dissect.runs.output_folder import replace_output_dir

    return replace_output_dir(recipe, options.output_dir)


def add_pair_columns(parser: argparse.ArgumentParser, image_column: str) -> None:
    """Add the options that name the columns of the data; `image_column` is the help of `--image-column`."""
    parser.add_argument("--image-column", help=image_column)
    parser.add_argument("--caption-column", help="column of the captions")
    parser.add_argument("--task-column", help="column of the tasks, for a MoLA adapter of variant grad")
    parser.add_argument("--image-features", help=".npz file of stored features, for models that read those")
    parser.add_argument("--text-features", help=".npz file of stored features of the captions, for such models")


def add_data_settings(parser: argparse.ArgumentParser) -> None:
    """Add the argument that sets how the data are read."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="how the data are read, as in a recipe (see docs/data.md): data.separator=';' data.encoding=cp1252",
    )
    parser.set_defaults(sections=("data",))


def add_repository_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the repository to publish to."""
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/REPO; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repository")
    parser.add_argument("--revision", help="branch to write to (default: main); created if it does not exist")


def parse_positive(text: str) -> int:
    """Parse the value of an option that must be an integer of at least 1."""
    return _parse_integer(text, 1)


def parse_not_negative(text: str) -> int:
    """Parse the value of an option that must be an integer of at least 0."""
    return _parse_integer(text, 0)


def _parse_integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: an integer of at least {least}")
    return int(text)
