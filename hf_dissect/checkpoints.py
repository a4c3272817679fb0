"""Finds the checkpoint a run can go on from, whatever the end of the last one was."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest `checkpoint-N` in a run folder that was written to its end, None without one."""
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", checkpoint)
        else:
            return checkpoint
    return None
