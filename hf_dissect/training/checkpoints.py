"""Checkpoints that exist wholly or not at all, and which of them a run can go on from."""

import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

UNFINISHED_FOLDER = "unfinished_checkpoints"
"""Where, inside a run folder, checkpoints are written before they get their names."""


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest `checkpoint-N` in a run folder that was written to its end, None without one."""
    checkpoints = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _number(path) is not None]
    for checkpoint in sorted(checkpoints, key=_number, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", checkpoint)
        else:
            return checkpoint
    return None


def publish(unfinished: Path, final: Path) -> None:
    """Give a checkpoint that was written to its end its name, in place of what may have had it.

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
