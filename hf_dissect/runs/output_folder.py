"""Choice of an output folder, so that no run or audit overwrites another."""

import dataclasses
import itertools
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState

from hf_dissect.recipe.file import RecipeFile
from hf_dissect.report.live import LIVE_FILES
from hf_dissect.training.checkpoints import UNFINISHED_FOLDER
from hf_dissect.training.run_folder import OWN_FILES, WRITTEN_FILES, find_foreign_model, find_result

logger = logging.getLogger(__name__)

_RecipeT = TypeVar("_RecipeT", bound=RecipeFile)


def choose_free_output_dir(recipe: _RecipeT, *, below: bool = False) -> _RecipeT:
    """Return the recipe with a run folder that holds no result: its own, or `<output_dir>-2`, `-3`, ...

    Args:
        recipe: Recipe of the run.
        below: True if the folders below it must be free, too, as those of a comparison.
    """
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        return recipe  # refused with the other mistakes

    def is_taken(path: Path) -> bool:
        return holds_run(path) or below and any(holds_run(part) for part in path.glob("*-seed*") if part.is_dir())

    free = find_free_folder(folder, is_taken)
    if free == folder:
        return recipe
    found = find_result(folder)
    what = "the runs of a comparison" if found is None else f"a run ({found.name})"
    what = f"a model ({found.name})" if found is not None and find_foreign_model(folder) else what
    logger.warning("%s already holds %s; this one goes to %s.", folder, what, free)
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
    stem = folder if folder.name not in ("", "..") else folder.resolve()  # "." has no name to add a number to
    names = itertools.chain([folder], (Path(f"{stem}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not is_taken(path))


def holds_run(folder: Path) -> bool:
    """Check that a folder holds a model, a checkpoint, or any file of a run, of an audit or of a comparison."""
    return find_result(folder) is not None


def check_run_folder(recipe: RecipeFile, *, overwrite: bool = False) -> None:
    """Check that a new run may write to the folder of a recipe.

    An earlier run is written over with a warning, as the Trainer does; the command `hf-dissect train` takes another
    folder instead. The model of another program is never written over unasked.

    Args:
        recipe: Recipe of the run.
        overwrite: True if what is there may be lost.

    Raises:
        ValueError: The folder holds a model that this package did not train, or with `overwrite`, something that the
            run reads.
    """
    folder = Path(recipe.output_dir)
    if overwrite:
        _check_reads_nothing(folder, recipe.to_dict(), "")
    elif foreign := find_foreign_model(folder):
        raise ValueError(
            f"training.output_dir {str(folder)!r} holds a model that is not of a run ({foreign.name}); name another "
            "folder, or overwrite it with --overwrite (overwrite=True)."
        )
    elif found := find_result(folder):
        logger.warning("%s holds an earlier run (%s), which this one writes over.", folder, found.name)


def remove_results(folder: Path) -> None:
    """Remove the files of a model and of an earlier run from a folder, and its checkpoints; every rank calls this.

    Files of other names stay.
    """
    processes = PartialState()
    if processes.is_main_process:
        for pattern in (*OWN_FILES, *WRITTEN_FILES, *LIVE_FILES):
            for path in folder.glob(pattern):
                if path.is_file() or path.is_symlink():
                    path.unlink()
        own = [path for path in folder.glob("checkpoint-*") if any((path / name).exists() for name in OWN_FILES)]
        for path in [*own, folder / UNFINISHED_FOLDER]:
            shutil.rmtree(path, ignore_errors=True)
    processes.wait_for_everyone()


def _check_reads_nothing(folder: Path, settings: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError for a setting that names the folder, or a file or folder in it."""
    for name, value in settings.items():
        key = f"{where}{name}"
        if isinstance(value, Mapping):
            _check_reads_nothing(folder, value, f"{key}.")
        elif isinstance(value, str) and value and key != "training.output_dir" and Path(value).exists():
            if Path(value).resolve().is_relative_to(folder.resolve()) and not where.startswith("training."):
                raise ValueError(
                    f"{key}: {value!r} is in {str(folder)!r}, which --overwrite would empty before the run; name "
                    "another folder with --output-dir."
                )
