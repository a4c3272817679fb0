"""Checkpoints that exist wholly or not at all, and the last one that a run can resume from."""

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
"""Folder, inside a run folder, that checkpoints are written to before they get their names."""


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@contextmanager
def explain_unwritable(name: str, run_folder: str | Path) -> Iterator[None]:
    """Turn the error of any of the writers inside the block into one that says what to do.

    Args:
        name: Name of what is written, such as "The checkpoint of step 40".
        run_folder: Folder of the run.

    Raises:
        CheckpointError: something could not be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_about_writing(error):
            raise
        free = shutil.disk_usage(run_folder).free / 2**20
        raise CheckpointError(
            f"{name} could not be written ({error}); {free:,.0f} MiB are free. Make room in {run_folder} and resume; "
            f"the last complete checkpoint is {last_complete_checkpoint(run_folder) or 'none'}."
        ) from error


def _is_about_writing(error: Exception) -> bool:
    # What is not written in Python reports a full disk in words: torch in its own, tokenizers in those of Rust.
    words = ("PytorchStreamWriter", "inline_container", "iostream", "(os error ")
    return isinstance(error, OSError | SafetensorError) or any(part in str(error) for part in words)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest `checkpoint-N` in a run folder that was written to its end, None without one."""
    checkpoints = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _number(path) is not None]
    for checkpoint in sorted(checkpoints, key=_number, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", checkpoint)
        else:
            return checkpoint
    return None


@contextmanager
def write_whole(final: Path, ranks: Ranks, names_it: bool) -> Iterator[Path]:
    """Give the folder to write a checkpoint to; give it its name when the block ends without an error.

    Args:
        final: Folder that the checkpoint gets at the end.
        ranks: Processes of the run; all of them have written before the checkpoint gets its name.
        names_it: Whether this process gives it its name: the first one of each node.

    Raises:
        CheckpointError: something could not be written.
    """
    run_folder = final.parent
    written = run_folder / UNFINISHED_FOLDER / final.name
    step = final.name.rpartition("-")[2]
    try:
        with explain_unwritable(f"The checkpoint of step {step}", run_folder):
            yield written
            ranks.wait()
            if names_it:
                publish(written, final)
            ranks.wait()
    finally:
        if names_it:
            remove_unfinished(run_folder)


def find_checkpoint(folder: str | Path) -> Path:
    """Return the last complete checkpoint of a run folder (`ValueError` if there is none)."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"No checkpoint to resume from in {folder}.")
    return checkpoint


def publish(unfinished: Path, final: Path) -> None:
    """Give a checkpoint that was written to its end its name, replacing an earlier one of that name.

    The files reach the disk before the name does, so that a machine that loses its power finds it whole or not at all.
    On a file system that several nodes share, one of them does it, and the others find it done.
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
    """Remove the oldest checkpoints beyond `limit`, never the best one."""
    rotate_checkpoints(output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def remove_unfinished(folder: str | Path) -> None:
    """Remove from a run folder what was left of checkpoints whose writing was cut short."""
    place = Path(folder) / UNFINISHED_FOLDER
    for replaced in place.glob("*.replaced"):
        # The run was killed between the two renames of `publish`: the old checkpoint is still a whole one.
        final = Path(folder) / replaced.name.removesuffix(".replaced")
        if not final.exists():
            os.replace(replaced, final)
    shutil.rmtree(place, ignore_errors=True)


def _number(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
