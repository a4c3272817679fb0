"""Checkpoints that exist completely or not at all, and the search for the last one to resume from."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_dissect.distributed import Ranks

logger = logging.getLogger(__name__)

UNFINISHED_FOLDER = "unfinished_checkpoints"
"""Folder, inside a run folder, of checkpoints that are not complete yet."""


class CheckpointError(OSError):
    """Error of a checkpoint that could not be written; earlier checkpoints are unchanged."""


@contextmanager
def explain_unwritable(name: str, run_folder: str | Path) -> Iterator[None]:
    """Replace an error of writing inside the block by one that says what to do.

    Args:
        name: Name of the files in the message, such as "The checkpoint of step 40".
        run_folder: Folder of the run.

    Raises:
        CheckpointError: A file could not be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_about_writing(error):
            raise
        free = shutil.disk_usage(run_folder).free / 2**20
        raise CheckpointError(
            f"{name} could not be written ({error}); {free:,.0f} MiB are free. Make room in {run_folder} and resume; "
            f"the last complete checkpoint is {find_last_checkpoint(run_folder) or 'none'}."
        ) from error


def _is_about_writing(error: Exception) -> bool:
    # The writers of torch (C++) and tokenizers (Rust) raise no OSError; their messages are recognised by these words.
    words = ("PytorchStreamWriter", "inline_container", "iostream", "(os error ")
    return isinstance(error, OSError | SafetensorError) or any(part in str(error) for part in words)


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete `checkpoint-N` of a run folder, None without one."""
    paths = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [(number, path) for path in paths if (number := _find_number(path)) is not None]
    for _, checkpoint in sorted(numbered, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is skipped.", checkpoint)
        else:
            return checkpoint
    return None


@contextmanager
def write_whole(final: Path, ranks: Ranks, *, publishes: bool) -> Iterator[Path]:
    """Yield a temporary folder for a checkpoint, and rename it at the end of the block if there was no error.

    Args:
        final: Folder of the complete checkpoint.
        ranks: Processes of the run, all of which must have written before the folder is renamed.
        publishes: True for the process that renames the folder, the first one of each node.

    Yields:
        Folder to write to.

    Raises:
        CheckpointError: A file could not be written.
    """
    run_folder = final.parent
    written = run_folder / UNFINISHED_FOLDER / final.name
    step = final.name.rpartition("-")[2]
    try:
        with explain_unwritable(f"The checkpoint of step {step}", run_folder):
            yield written
            ranks.wait()
            if publishes:
                publish(written, final)
            ranks.wait()
    finally:
        if publishes:
            remove_unfinished(run_folder)


def find_checkpoint(folder: str | Path) -> Path:
    """Return the last complete checkpoint of a run folder to resume from.

    Raises:
        ValueError: The folder has no complete checkpoint.
    """
    checkpoint = find_last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"No checkpoint to resume from in {folder}.")
    return checkpoint


def choose_checkpoint(folder: str | Path, asked: str | Path | bool | None) -> str | None:
    """Return the checkpoint to resume from; None to train from the start.

    Args:
        folder: Folder of the run.
        asked: Checkpoint, or True for the last complete one of the run.

    Raises:
        ValueError: The run has no complete checkpoint.
    """
    found = find_checkpoint(folder) if asked is True else asked
    return str(found) if found else None


def publish(unfinished: Path, final: Path) -> None:
    """Rename the folder of a complete checkpoint, and remove an earlier checkpoint of that name.

    The files reach the disk before the new name, so that a power failure leaves a complete checkpoint or none. On a
    file system that several nodes share, one node renames the folder, and the others find it renamed.

    Args:
        unfinished: Folder that the checkpoint was written to.
        final: Folder of the complete checkpoint.
    """
    replaced = unfinished.with_name(unfinished.name + ".replaced")
    try:
        for path in [file for file in unfinished.rglob("*") if file.is_file()]:
            _flush_to_disk(path)
        if final.exists() and unfinished.exists():
            os.replace(final, replaced)
        os.replace(unfinished, final)
    except FileNotFoundError:
        if not final.exists():
            raise
    _flush_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_surplus(folder: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints of a run folder.

    Args:
        folder: Run folder.
        limit: Number of checkpoints to keep; None for all.
        best: Checkpoint that is never removed; None without one.
    """
    rotate_checkpoints(output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the remains of checkpoints whose writing was interrupted from a run folder."""
    place = Path(folder) / UNFINISHED_FOLDER
    for replaced in place.glob("*.replaced"):
        # The run was killed between the two renames of `publish`, and the old checkpoint is complete.
        final = Path(folder) / replaced.name.removesuffix(".replaced")
        if not final.exists():
            os.replace(replaced, final)
    shutil.rmtree(place, ignore_errors=True)


def _find_number(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
