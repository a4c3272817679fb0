"""Read what `Dataset.save_to_disk` and `DatasetDict.save_to_disk` wrote."""

import logging
from collections.abc import Mapping
from pathlib import Path, PurePath

import datasets
from datasets import Dataset, DatasetDict

from hf_dissect.data.split_files import find_split, group_by_split, summarize_error

_DICT_FILE, _STATE_FILE, _INFO_FILE = "dataset_dict.json", "state.json", "dataset_info.json"

logger = logging.getLogger(__name__)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder, or all of its subfolders that hold anything, were written by `save_to_disk`."""
    return (folder / _DICT_FILE).is_file() or _is_one(folder) or bool(_find_saved_subfolders(folder))


def read_saved_dataset(root: Path, split_names: Mapping[str, str | None]) -> dict[str, Dataset]:
    """Read a saved data set by split; one without splits is all train.

    Args:
        root: Folder for which `is_saved_dataset` holds.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.

    Raises:
        ValueError: If a file is missing or damaged, or there is no train split.
    """
    if _is_one(root):
        return {"train": _load(root)}
    if not (root / _DICT_FILE).is_file():
        folders = group_by_split(_find_saved_subfolders(root), root, split_names)
        return {split: datasets.concatenate_datasets(list(map(_load, each))) for split, each in folders.items()}
    found = _load(root)
    chosen: dict[str, list[str]] = {}
    for name in found:
        split = find_split(name, split_names)
        if split:
            chosen.setdefault(split, []).append(name)
    splits = {}
    for split in split_names:
        names = chosen.get(split, [])
        exact = [name for name in names if name == split_names[split]] or names
        if len(exact) > 1:
            raise ValueError(
                f"data.path {str(root)!r} has several splits for {split}: {', '.join(exact)}. Set data.{split}_split "
                "to one of them."
            )
        if exact:
            splits[split] = found[exact[0]]
    if "train" not in splits:
        raise ValueError(
            f"data.path {str(root)!r} has no train split: none begins with {split_names['train']!r}; it has "
            f"{', '.join(found)}. Set data.train_split to one of these."
        )
    if others := [name for name in found if not any(found[name] is rows for rows in splits.values())]:
        logger.warning("Left out of %s: the splits %s.", root, ", ".join(others))
    return splits


def _is_one(folder: Path) -> bool:
    return (folder / _STATE_FILE).is_file() and (folder / _INFO_FILE).is_file()


def _find_saved_subfolders(root: Path) -> list[PurePath]:
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return list(folders) if folders and all(map(_is_one, folders)) else []


def _load(folder: Path | PurePath) -> Dataset | DatasetDict:
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise errors of many kinds, with the same way out
        raise ValueError(
            f"data.path {str(folder)!r} was written by save_to_disk, but cannot be loaded ({type(error).__name__}: "
            f"{summarize_error(error)}). A file may be missing or cut off: copy the folder again."
        ) from error
    return rows.with_format(None)  # a format that was saved along would give tensors
