"""Controls what the processes of a command print: only the first one, and no more than is of use."""

import os
import warnings


def is_first_process() -> bool:
    """Check that this process prints, the first of those that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def announce(text: str) -> None:
    """Print a line after an empty one, from the first process only."""
    if is_first_process():
        print(f"\n{text}", flush=True)


def quiet_libraries() -> None:
    """Switch off the progress bars of the libraries, which would hide the one of the run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    # peft causes it for every adapter, and no user can change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
