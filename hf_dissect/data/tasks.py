"""Numbers of tasks that are names, the same in training, in evaluation and after a model is loaded again."""

import json
import logging
from pathlib import Path
from typing import Any

from hf_dissect.data.pairs import PairDataset

TASKS_FILE = "tasks.json"

logger = logging.getLogger(__name__)


def number_tasks_alike(train: Any, evaluation: Any) -> None:
    """Give the named tasks of the evaluation data the numbers that they have in the training data.

    Args:
        train: Training pairs, or None.
        evaluation: Pairs, a dict of several, or None.

    Raises:
        ValueError: A task of the evaluation data is not one of the training data.
    """
    names = getattr(train, "task_names", None)
    if names is None:
        return
    for pairs in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        if isinstance(pairs, PairDataset):
            pairs.number_tasks(names)


def save_task_names(pairs: Any, folder: str | Path) -> None:
    """Write the names of the tasks, in the order of their numbers, where the tasks of `pairs` are names."""
    names = getattr(pairs, "task_names", None)
    if names is not None:
        (Path(folder) / TASKS_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def read_task_names(folder: str | Path) -> list[str] | None:
    """Return the names of the tasks that a model was trained on, by number; None if they are not known."""
    file = Path(folder) / TASKS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def number_tasks_as_saved(pairs: Any, folder: str | Path) -> None:
    """Give the named tasks of `pairs` the numbers that they had in the training of a model.

    Args:
        pairs: Pairs, with or without tasks.
        folder: Folder of the model.

    Raises:
        ValueError: A task is not one of the training.
    """
    if getattr(pairs, "task_names", None) is None:
        return
    if (names := read_task_names(folder)) is not None:
        pairs.number_tasks(names)
    else:
        logger.warning(
            "%s has no %s: tasks are numbered in the alphabetical order of their names.", folder, TASKS_FILE
        )
