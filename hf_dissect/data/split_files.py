"""Assign local files to splits by their names and folders.

Written by hand next to the split patterns of `datasets.load_dataset`. Those take the first kind of pattern that fits
any file: one folder `test/` hides `train-0.parquet` next to it. They read a copy in a subfolder a second time, know no
split names but their own, and do not report which files they found when none of them is train.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TypeVar

_USUAL_PREFIXES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

AnyPath = TypeVar("AnyPath", bound=PurePath)

logger = logging.getLogger(__name__)


def require_path(path: str) -> Path:
    """Return the path if a file or folder is there.

    Raises:
        FileNotFoundError: If not; the message lists the content of the nearest folder that exists.
    """
    given = Path(path).expanduser()
    if not given.exists():
        nearest = next(parent for parent in given.absolute().parents if parent.is_dir())
        raise FileNotFoundError(
            f"data.path {path!r} does not exist; {str(nearest)!r} holds {list_folder(nearest)}. Correct it, or set "
            "data.source to hub for a Hub id."
        )
    return given


def group_by_split(
    files: Iterable[AnyPath], root: PurePath, split_names: Mapping[str, str | None]
) -> dict[str, list[AnyPath]]:
    """Group files by split, by the beginning of the file name or of a folder name between `root` and the file.

    If no name begins with a split, all files are train.

    Args:
        files: Files in `root` or in its subfolders.
        root: Folder above which names do not count.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.

    Raises:
        ValueError: If there are splits and none of them is train.
    """
    files, prefixes = sorted(files), _map_prefixes(split_names)
    split_of = {file: _find_split(_list_parts(file, root), prefixes) for file in files}
    found = {split: [file for file in files if split_of[file] == split] for split in split_names}
    found = {split: _keep_outermost(members, root) for split, members in found.items() if members}
    unnamed = [file for file in files if split_of[file] == ""]
    if len(unnamed) == len(files) and split_names["train"] == "train":
        return {"train": _keep_outermost(unnamed, root)}
    if "train" not in found:
        raise ValueError(
            f"data.path {str(root)!r} has no train split: no file or subfolder begins with "
            f"{split_names['train']!r}; found {join_names(files)}. Rename one, or set data.train_split."
        )
    if unnamed:
        logger.warning("Left out, as the name begins with no split: %s", join_names(unnamed))
    return found


def split_by_folder(names: Iterable[str | None], split_names: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Return the positions of file names by split, which their outermost folder names.

    The result is empty if a name lies in no folder that begins with a split, or if none of them is train.
    """
    prefixes = _map_prefixes(split_names)
    split_of = [_find_split(Path(name or "").parent.parts[:1], prefixes) for name in names]
    if "" in split_of or "train" not in split_of:
        return {}
    positions = {split: [row for row, own in enumerate(split_of) if own == split] for split in split_names}
    return {split: members for split, members in positions.items() if members}


def find_split(name: str, split_names: Mapping[str, str | None]) -> str | None:
    """Return the split that a name begins with: "" if there is none, None for a split left out."""
    return _find_split([name], _map_prefixes(split_names))


def find_split_folders(
    files: Iterable[Path], root: Path, split_names: Mapping[str, str | None]
) -> tuple[dict[str, list[Path]], set[Path]]:
    """Group files by the outermost folders that differ, where these name splits; otherwise all are train.

    Other folders may be classes, among them `train` or `valley`. So the folders name splits only if all of them do, or
    if `train` and another split are there by their exact names; then the others are left out.

    Args:
        files: Files in subfolders of `root`.
        root: Folder above which names do not count.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.

    Returns:
        Files by split, and the folders that name the splits.

    Raises:
        ValueError: If all folders name splits and none of them is train.
    """
    files = list(files)
    base = root
    while len(names := {_first_part(file, base) for file in files}) == 1 and not names & {""}:
        (name,) = names
        if is_split_name(name, split_names):
            break
        base = base / name
    split_of = {name: find_split(name, split_names) if is_split_name(name, split_names) else "" for name in names}
    exact = {split_of[name] for name in names if _is_exact(name, split_names)}
    if "" in split_of.values() and not ("train" in exact and len(exact) > 1):
        return {"train": files}, set()
    parts = {split: [file for file in files if split_of[_first_part(file, base)] == split] for split in split_names}
    others = sorted(name for name in names if split_of[name] == "")
    if not parts["train"]:
        raise ValueError(
            f"data.path {str(root)!r} has no train split: no subfolder is named {split_names['train']!r}; found "
            f"{', '.join(sorted(names))}. Rename one, or set data.train_split."
        )
    if others:
        logger.warning("Left out, as the folder names no split: %s", ", ".join(name or str(base) for name in others))
    return {split: members for split, members in parts.items() if members}, {base / name for name in names if name}


def is_split_name(name: str, split_names: Mapping[str, str | None]) -> bool:
    """Return whether a folder is named by a split, alone or with a number or another word after it (`train2017`)."""
    lowered = name.lower()
    words = [*_map_prefixes(split_names), "training", "testing"]
    return any(lowered.startswith(word) and not lowered[len(word) :][:1].isalpha() for word in words)


def list_folder(folder: Path) -> str:
    """Return the first names in a folder, for error messages."""
    return join_names(sorted(child for child in folder.iterdir() if not child.name.startswith(".")))


def join_names(files: Iterable[PurePath], limit: int = 6) -> str:
    """Return the first file names, for error messages."""
    names = [file.name for file in files]
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"


def summarize_error(error: BaseException) -> str:
    """Return the first line of another library's error message, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _map_prefixes(split_names: Mapping[str, str | None]) -> dict[str, str | None]:
    """Map beginnings of names to splits; to None for the usual names of a split left out, which must not be train."""
    usual: dict[str, str | None] = {prefix: None for prefixes in _USUAL_PREFIXES.values() for prefix in prefixes}
    given = {
        prefix: split
        for split, name in split_names.items()
        if name is not None
        for prefix in ((name.lower(),) if name != split else _USUAL_PREFIXES[split])
    }
    return {**usual, **given}


def _is_exact(name: str, split_names: Mapping[str, str | None]) -> bool:
    return name.lower() in _map_prefixes(split_names)


def _first_part(file: Path, base: Path) -> str:
    """Return the outermost folder of a file below `base`, or "" if it lies in `base` itself."""
    parts = file.relative_to(base).parts
    return parts[0] if len(parts) > 1 else ""


def _find_split(parts: Iterable[str], prefixes: Mapping[str, str | None]) -> str | None:
    """Return the split with the longest fitting prefix: "" if no name begins with one, None for a split left out."""
    for part in parts:
        fitting = [prefix for prefix in prefixes if part.lower().startswith(prefix)]
        if fitting:
            return prefixes[max(fitting, key=len)]
    return ""


def _list_parts(file: PurePath, root: PurePath) -> tuple[str, ...]:
    """Return the file name and the folders between it and the root, innermost first."""
    return tuple(reversed(file.relative_to(root).parts)) if file.is_relative_to(root) else (file.name,)


def _keep_outermost(files: list[AnyPath], root: PurePath) -> list[AnyPath]:
    """Return the files of a split in the root itself, if there are any: a copy in a subfolder must not count twice."""
    at_root = [file for file in files if file.parent == root]
    if at_root and len(at_root) < len(files):
        inside = [file for file in files if file.parent != root]
        logger.warning("Left out, as files of the same split are in the folder above: %s", join_names(inside))
    return at_root or files
