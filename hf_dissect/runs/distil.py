"""Training and evaluation of a student as the recipe of a distillation says."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset

from hf_dissect.data.loading import load_splits
from hf_dissect.distillation.criterion import Criterion
from hf_dissect.distillation.recipe import DistillationDataSection, DistillationRecipe
from hf_dissect.distillation.schema import AUTO
from hf_dissect.distillation.training_data import Columns, check_column, check_lengths
from hf_dissect.hub.published_files import RECIPE_FILE
from hf_dissect.recipe.file import read_settings
from hf_dissect.runs.before_training import check_disk_space, check_surroundings
from hf_dissect.runs.distillation_trainer import build_trainer
from hf_dissect.runs.output_folder import check_run_folder, remove_results
from hf_dissect.runs.pilot import CHOICES, choose_method, replace_method
from hf_dissect.runs.training import train_to_end
from hf_dissect.training.checkpoints import find_checkpoint

__all__ = ["build_trainer", "load_columns", "run_distillation"]

logger = logging.getLogger(__name__)


def run_distillation(
    recipe: DistillationRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Train and evaluate as a recipe says, and leave a complete run folder.

    With the method "auto", a pilot chooses the method, and the run is that of the recipe with this method in its
    place, which its folder holds as well. A resumed run keeps the method of its checkpoint.

    Args:
        recipe: Recipe of the run; its `output_dir` is the run folder.
        resume: True to continue from the last complete checkpoint in the run folder.
        overwrite: True to remove what an earlier run left in the run folder, when training begins.
        announce: Function that reports the choice of a pilot.

    Returns:
        The content of `metrics.json`.

    Raises:
        HubUnreachable: The Hub is needed, and does not answer.
        ValueError: There is no checkpoint to resume from, the folder holds a model of another program, or settings and
            data do not fit.
    """
    checkpoint = find_checkpoint(recipe.output_dir) if resume else None
    check_surroundings(recipe)
    if checkpoint is None:
        check_run_folder(recipe, overwrite=overwrite)
    splits = load_columns(recipe.data)
    choice = None
    if recipe.distillation.method == AUTO:
        recipe, choice = _settle_method(recipe, splits, checkpoint, announce)
    trainer = build_trainer(recipe, splits)
    if choice is not None:
        trainer.measurement.measured["choice"] = choice
    check_disk_space(trainer.model, trainer.args)
    if overwrite and checkpoint is None:
        remove_results(Path(recipe.output_dir))
    with trainer.stop_request.listen():  # also between the last step and the final figures
        train_to_end(trainer, checkpoint)
        return trainer.finish(splits.get("test"))


def _settle_method(
    recipe: DistillationRecipe,
    splits: Mapping[str, Columns],
    checkpoint: Path | None,
    announce: Callable[[str], None],
) -> tuple[DistillationRecipe, Criterion | None]:
    """Return the recipe with the method that a pilot chooses, or that of the checkpoint to resume from.

    Returns:
        The recipe, and the criterion of the pilot; None for a checkpoint, which has it.

    Raises:
        ValueError: The checkpoint does not say its method, or settings and data do not fit.
    """
    if checkpoint is not None:
        path = checkpoint / RECIPE_FILE
        method = read_settings(path).get("distillation", {}).get("method") if path.is_file() else None
        if method in (None, AUTO):
            raise ValueError(
                f"distillation.method auto: {checkpoint} does not say which method it trains; name it with "
                "distillation.method=..., or start again without --resume."
            )
        announce(f"distillation.method auto: the run continues with {method}, the method of its checkpoint.")
        return replace_method(recipe, method), None
    # With the least and the most networks, so that no fault waits for the end of the pilot.
    for method in (CHOICES[0], CHOICES[-1]):
        check_disk_space((trainer := build_trainer(replace_method(recipe, method), splits)).model, trainer.args)
        del trainer
    choice = choose_method(recipe, splits)
    announce(f"distillation.method auto: {choice.sentence} ({choice.seconds:.0f} s for the pilot).")
    return replace_method(recipe, choice.method), choice


def load_columns(section: DistillationDataSection) -> dict[str, Columns]:
    """Load the splits of a data section by name: "train" and, if there are any, "validation" and "test"."""
    if section.source == "npz":
        splits: dict[str, Columns] = {"train": read_arrays(cast(str, section.path))}  # a checked recipe has a path
    else:
        names = ["source", "path", "name", "train_split", "validation_split", "test_split"]
        names += ["separator", "encoding", "image_root"]
        given = {name: getattr(section, name) for name in names}
        if section.group_column is not None:
            given |= {"validation_split": None, "test_split": None}
        splits = load_splits(**given)
    if section.group_column is not None:
        splits = split_by_group(splits["train"], section, section.group_column)
    limits = {"train": section.max_train_rows}
    return {name: take_first_rows(part, limits.get(name, section.max_eval_rows)) for name, part in splits.items()}


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file without unpickling anything.

    Args:
        path: File of arrays (.npz), or folder with one.

    Returns:
        Arrays of equal length, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, the lengths differ, or the folder has several files of arrays.
    """
    files = sorted(Path(path).glob("*.npz")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"data.path {path!r}: there is no .npz file of arrays; name one, or a folder with one."
        )
    if len(files) > 1:
        raise ValueError(f"data.path {path!r} holds several .npz files; name one: {', '.join(f.name for f in files)}.")
    try:
        with np.load(files[0], allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"data.path {str(files[0])!r} is not a file of plain arrays ({error}).") from error
    check_lengths(arrays, f"data.path {str(files[0])!r}: the arrays")
    return arrays


def split_by_group(columns: Columns, section: DistillationDataSection, group_column: str) -> dict[str, Columns]:
    """Split rows by the group that they belong to.

    Args:
        columns: Data to split.
        section: Data section that lists the groups of each split.
        group_column: Column of the groups.

    Returns:
        Splits by name; a split without groups is left out.

    Raises:
        ValueError: There is no such column, or a group has no row.
    """
    check_column(group_column, columns, "data.group_column")
    values = np.asarray(columns[group_column]).tolist()
    splits = {}
    for name in ("train", "validation", "test"):
        groups = getattr(section, f"{name}_groups")
        if absent := [group for group in groups if group not in values]:
            known = ", ".join(map(str, sorted(set(values), key=str)[:20]))
            raise ValueError(f"data.{name}_groups: no row has {absent[0]!r} in {group_column}; there are {known}.")
        if groups:
            splits[name] = select_groups(columns, group_column, groups)
    return splits


def select_groups(columns: Columns, group_column: str, groups: list[Any]) -> Columns:
    """Return the rows that have one of `groups` in the column of the groups."""
    values = np.asarray(columns[group_column]).tolist()
    return _select_rows(columns, [row for row, value in enumerate(values) if value in groups])


def take_first_rows(columns: Columns, count: int | None) -> Columns:
    """Return the first `count` rows, or all rows if `count` is None."""
    length = len(columns) if isinstance(columns, Dataset) else len(next(iter(columns.values())))
    return columns if count is None or count >= length else _select_rows(columns, list(range(count)))


def _select_rows(columns: Columns, rows: list[int]) -> Columns:
    if isinstance(columns, Dataset):
        return columns.select(rows)
    return {name: cast(Any, values)[rows] for name, values in columns.items()}
