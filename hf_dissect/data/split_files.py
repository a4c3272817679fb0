"""Which local file belongs to which split, told from its name or its folder, with a clear word when none is train."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

_USUAL_PREFIXES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

logger = logging.getLogger(__name__)


def existing_path(path: str) -> Path:
    """The path, if something is there.

    Raises:
        FileNotFoundError: Otherwise; the message names what is in the nearest folder that exists.
    """
    given = Path(path).expanduser()
    if not given.exists():
        nearest = next(parent for parent in given.absolute().parents if parent.is_dir())
        raise FileNotFoundError(
            f"data.path {path!r} does not exist; {str(nearest)!r} holds {listing(nearest)}. Correct it, or set "
            "data.source to hub for a Hub id."
        )
    return given


def group_by_split(files: Iterable[Path], root: Path, split_names: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Files by split, told from the file name or a folder name between `root` and the file.

    If no name begins with a split, all files are train.

    Args:
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.

    Raises:
        ValueError: If none of them is train.
    """
    files, prefixes = sorted(files), _split_prefixes(split_names)
    split_of = {file: _split_of(_parts(file, root), prefixes) for file in files}
    found = {split: [file for file in files if split_of[file] == split] for split in split_names}
    found = {split: _outermost(members, root) for split, members in found.items() if members}
    unnamed = [file for file in files if split_of[file] == ""]
    if len(unnamed) == len(files) and split_names["train"] == "train":
        return {"train": _outermost(unnamed, root)}
    if "train" not in found:
        raise ValueError(
            f"data.path {str(root)!r} has no train split: no file or subfolder begins with "
            f"{split_names['train']!r}; found {shown(files)}. Rename one, or set data.train_split."
        )
    if unnamed:
        logger.warning("Left out, as the name begins with no split: %s", shown(unnamed))
    return found


def split_by_folder(names: Iterable[str | None], split_names: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Positions of the file names by split, if each lies in a split's folder and train is among them; else empty."""
    prefixes = _split_prefixes(split_names)
    split_of = [_split_of(Path(name or "").parent.parts[:1], prefixes) for name in names]
    if "" in split_of or "train" not in split_of:
        return {}
    positions = {split: [row for row, own in enumerate(split_of) if own == split] for split in split_names}
    return {split: members for split, members in positions.items() if members}


def listing(folder: Path) -> str:
    """The first names in a folder, for error messages."""
    return shown(sorted(child for child in folder.iterdir() if not child.name.startswith(".")))


def shown(files: Iterable[Path], limit: int = 6) -> str:
    """The first file names, for error messages."""
    names = [file.name for file in files]
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its details."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _split_prefixes(split_names: Mapping[str, str | None]) -> dict[str, str | None]:
    """Split by the beginning of a name; None for the usual names of a split left out: it must not become train."""
    usual = {prefix: None for prefixes in _USUAL_PREFIXES.values() for prefix in prefixes}
    given = {
        prefix: split
        for split, name in split_names.items()
        if name is not None
        for prefix in ((name.lower(),) if name != split else _USUAL_PREFIXES[split])
    }
    return {**usual, **given}


def _split_of(parts: Iterable[str], prefixes: Mapping[str, str | None]) -> str | None:
    """The split whose prefix is the longest; "" if no name begins with one, None if that split is left out."""
    for part in parts:
        fitting = [prefix for prefix in prefixes if part.lower().startswith(prefix)]
        if fitting:
            return prefixes[max(fitting, key=len)]
    return ""


def _parts(file: Path, root: Path) -> tuple[str, ...]:
    """The file name and the folders between it and the root, from the inside out."""
    return tuple(reversed(file.relative_to(root).parts)) if file.is_relative_to(root) else (file.name,)


def _outermost(files: list[Path], root: Path) -> list[Path]:
    """The files of a split in the root itself, if there are any: a copy in a subfolder must not count twice."""
    at_root = [file for file in files if file.parent == root]
    if at_root and len(at_root) < len(files):
        inside = [file for file in files if file.parent != root]
        logger.warning("Left out, as files of the same split are in the folder above: %s", shown(inside))
    return at_root or files
