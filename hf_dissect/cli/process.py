"""What the commands have in common: how they are added, numbers as options, and how much a process says."""

import argparse
import os
import warnings
from collections.abc import Callable


def add_command(
    subparsers,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    epilog: str,
    after_interrupt: str = "",
) -> argparse.ArgumentParser:
    """Add a command to those of `hf-dissect`.

    Args:
        subparsers: of the parser of `hf-dissect`.
        name: of the command.
        run: carries it out.
        summary: one line of what it does.
        epilog: examples, shown as they stand.
        after_interrupt: told when the command was interrupted, to say how to go on.
    """
    parser = subparsers.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, after_interrupt=after_interrupt)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_pair_columns(parser: argparse.ArgumentParser, image_column: str) -> None:
    """Which columns of the data hold what; `image_column` is the help of that option."""
    parser.add_argument("--image-column", help=image_column)
    parser.add_argument("--caption-column", help="column of the captions")
    parser.add_argument("--task-column", help="column of the tasks, for a MoLA adapter of variant grad")
    parser.add_argument("--image-features", help=".npz of stored features, for models that read those")


def positive(text: str) -> int:
    """An option's integer of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """An option's integer of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: an integer of at least {least}")
    return int(text)


def is_first_process() -> bool:
    """Whether this is the process that prints, of all that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def quiet_libraries() -> None:
    """One progress bar a run is enough: the libraries' own bars for a file or two say nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    # Said by peft's use of transformers for every adapter; nothing that a user could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
