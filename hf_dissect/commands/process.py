"""What the commands have in common: numbers as options, and how much a process says."""

import argparse
import os
import warnings


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
