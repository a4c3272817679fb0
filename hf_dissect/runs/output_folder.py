"""Choice of an output folder, so that no run or audit overwrites another."""

import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hf_dissect.recipe.file import RecipeFile

logger = logging.getLogger(__name__)

_RecipeT = TypeVar("_RecipeT", bound=RecipeFile)


def choose_free_output_dir(recipe: _RecipeT) -> _RecipeT:
    """Return the recipe with a run folder that holds no run: its own, or `<output_dir>-2`, `-3`, ..."""
    folder = Path(recipe.output_dir)
    free = find_free_folder(folder, holds_run)
    if free == folder:
        return recipe
    logger.warning("%s already holds a run; this one goes to %s.", folder, free)
    return replace_output_dir(recipe, free)


def replace_output_dir(recipe: _RecipeT, folder: str | Path) -> _RecipeT:
    """Return the recipe with `folder` as its run folder."""
    replaced: Any = recipe  # a dataclass, which its base is not
    return dataclasses.replace(replaced, training=recipe.training | {"output_dir": str(folder)})


def find_free_folder(folder: Path, is_taken: Callable[[Path], bool]) -> Path:
    """Return the folder, or the first of `<folder>-2`, `-3`, ... if it is taken.

    Args:
        folder: Preferred folder.
        is_taken: Function that returns True for a folder that must not be used.
    """
    names = itertools.chain([folder], (Path(f"{folder}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not is_taken(path))


def holds_run(folder: Path) -> bool:
    """Check that a folder holds a finished run or a checkpoint."""
    return (folder / "metrics.json").exists() or any(folder.glob("checkpoint-*"))
