"""The command `hf-dissect`; each module of this folder adds one of its commands."""

import argparse
import gc
import logging
import sys
from collections.abc import Sequence

from hf_dissect.cli import audit, compare, evaluate, export, job, push, push_ledger, recipes, skill, train, watch
from hf_dissect.cli.misspelt import correct_settings, suggest_setting
from hf_dissect.cli.output import is_first_process
from hf_dissect.recipe.recipe import Recipe, RecipeError
from hf_dissect.settings import list_settings
from hf_dissect.version import __version__

# In the order of --help.
_COMMANDS = (train, watch, compare, evaluate, audit, recipes, job, push, push_ledger, export, skill)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line; None for those of this process.

    Returns:
        The exit status: 0, 2 for settings or data that cannot work, 130 after Ctrl-C.
    """
    try:
        options = parse_words(_build_parser(), list(sys.argv[1:] if arguments is None else arguments))
    except RecipeError as error:
        print(f"hf-dissect: {error}", file=sys.stderr)
        return 2
    return carry_out(options)


def carry_out(options: argparse.Namespace) -> int:
    """Carry out a parsed command, whose errors become one line; return the exit status as `main` does."""
    # Every process would print the same warnings.
    level = logging.WARNING if is_first_process() else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.after_interrupt}".rstrip(), file=sys.stderr)
        return 130
    except SystemExit as stop:  # StoppedBySignal, after a checkpoint
        print(f"\nhf-dissect: {stop} {options.after_interrupt}".rstrip(), file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if options.debug or not _is_for_the_user(error):
            raise
        print(f"hf-dissect: {error}", file=sys.stderr)
        return 2
    _leave_process_group()
    return 0


def parse_words(
    parser: argparse.ArgumentParser, words: Sequence[str], command: str | None = None
) -> argparse.Namespace:
    """Parse a command line whose settings may stand before or after the options, which argparse does not allow.

    Args:
        parser: Parser of the words.
        words: Words of the command line.
        command: Name of the command in errors; None if it is the first word.

    Raises:
        RecipeError: A word is nearly a setting; the message says how it is written.
    """
    options, rest = parser.parse_known_args(words)
    words, command = (words, command) if command else (words[1:], words[0] if words else "")
    if hasattr(options, "overrides") and (correction := _correct(words, options)):
        raise RecipeError(command, [correction])
    unknown = [part for part in rest if part.startswith("-") or "=" not in part or not hasattr(options, "overrides")]
    if (
        unknown
        and hasattr(options, "overrides")
        and (correction := suggest_setting(unknown, getattr(options, "sections", None)))
    ):
        raise RecipeError(command, [correction])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _correct(words: Sequence[str], options: argparse.Namespace) -> str | None:
    """Return how a setting is written that stands in another form; a command without a recipe has some sections."""
    if not hasattr(options, "sections"):
        return correct_settings(words)
    sections = {name: kind for name, kind in Recipe.sections().items() if name in options.sections}
    return correct_settings(words, {f"{name}.{key}" for name, kind in sections.items() for key in list_settings(kind)})


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dissect", description="Train CLIP-like models on the image-text pairs that are worth a gradient."
    )
    parser.add_argument("--version", action="version", version=f"hf-dissect {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _is_for_the_user(error: Exception) -> bool:
    """Check that an error says what to change; any other is a fault of the program and keeps its traceback."""
    if isinstance(error, RecipeError | FileNotFoundError | ValueError):
        return True
    # Imported here because the commands about recipes must not wait for torch.
    from hf_dissect.data.bad_rows import TooManyBadRows
    from hf_dissect.training.interruption import DataWorkerDied
    from hf_dissect.training.non_finite import NonFiniteLossError

    # ImportError: a setting needs a package that is not installed, such as a tracker or an optimiser.
    return isinstance(error, TooManyBadRows | NonFiniteLossError | DataWorkerDied | OSError | ImportError)


def _leave_process_group() -> None:
    """Close the group of processes that trained together, as torch requires at the end of each of them."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # What trained still holds groups of its own (FSDP's mesh): destroyed at the interpreter's exit, their threads
        # abort the process now and then.
        gc.collect()
        distributed.barrier()  # a process that leaves while the first one still writes may be aborted
        distributed.destroy_process_group()
