"""Read folders of pictures without a table: captions in text files next to them, or classes as folders."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.split_files import find_split_folders, is_split_name, join_names
from hf_dissect.data.tables.text_file import read_text

PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
)  # fmt: skip
_TEXT_SUFFIXES = (".txt", ".caption")
_JSON_CAPTIONS = ("caption", "text")
LABEL_COLUMN = "label"

logger = logging.getLogger(__name__)


def walk_files(root: Path) -> list[Path]:
    """Return all files in a folder and its subfolders in the order of their names, without hidden ones."""
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A link to a folder above would be followed for ever.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(files)


def read_pictures(
    root: Path, pictures: list[Path], split_names: Mapping[str, str | None], options: ReadingOptions
) -> dict[str, Dataset] | None:
    """Read pictures with the captions next to them, or else with the names of their folders.

    `a.jpg` has its caption in `a.txt`, `a.caption` or the `caption` of `a.json`; a picture without one is a bad row.
    If no picture has such a file, the folder that it lies in is its class and fills the template.

    Args:
        root: Folder of the pictures.
        pictures: Files in it.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        options: Encoding of the text files, template of the classes, and names of the columns.

    Returns:
        Rows by split, with the columns `image`, `caption` and, for classes, `label`; None if the pictures have neither
        captions nor classes.

    Raises:
        ValueError: If a text file is unreadable.
    """
    parts, top = find_split_folders(pictures, root, split_names)
    names = (options.image_column or "image", options.caption_column or "caption")
    texts = {picture: sidecars for picture in pictures if (sidecars := _find_sidecars(picture))}
    if texts:
        captions = {picture: _read_caption(files, options.encoding) for picture, files in texts.items()}
        features = Features({names[0]: Image(decode=False), names[1]: Value("string")})
        return {
            split: Dataset.from_dict(
                {names[0]: _as_images(members), names[1]: [captions.get(member) for member in members]}, features
            )
            for split, members in parts.items()
        }
    plain = {root, *top, *(folder.parent for folder in top)}
    classes = {picture: picture.parent.name for picture in pictures if picture.parent not in plain}
    if len(set(classes.values())) < 2:
        return None
    if all(is_split_name(name, split_names) for name in classes.values()):
        raise ValueError(
            f"data.path {str(root)!r} has the folders of the splits inside of the folders of the classes, such as "
            f"{str(pictures[0].relative_to(root))!r}. Put the classes inside of the splits: train/dog/0.jpg."
        )
    if len(classes) < len(pictures):
        strays = [picture for picture in pictures if picture not in classes]
        logger.warning("Without a class, as they lie in no class folder: %s", join_names(strays))
    label = ClassLabel(names=sorted(set(classes.values())))
    features = Features({names[0]: Image(decode=False), names[1]: Value("string"), LABEL_COLUMN: label})
    splits = {}
    for split, members in parts.items():
        members = _take_turns(members, classes)
        found = [classes.get(member) for member in members]
        columns = {
            names[0]: _as_images(members),
            names[1]: [None if name is None else fill_template(options.class_template, name) for name in found],
            LABEL_COLUMN: found,
        }
        splits[split] = Dataset.from_dict(columns, features)
    return splits


def fill_template(template: str, name: str) -> str:
    """Return the caption of a class, whose underscores are spaces; {} or {class} stands for it."""
    words = " ".join(name.replace("_", " ").split())
    return template.replace("{class}", words).replace("{}", words)


def _as_images(pictures: Iterable[Path]) -> list[dict[str, str | None]]:
    return [{"bytes": None, "path": str(picture.absolute())} for picture in pictures]


def is_sidecar(file: Path, stems: set[PurePath]) -> bool:
    """Return whether a file belongs to a picture of the same name, given the pictures without their suffixes."""
    return file.suffix.lower() in (*_TEXT_SUFFIXES, ".json") and file.with_suffix("") in stems


def _find_sidecars(picture: Path) -> list[Path]:
    """Return the files that may hold the caption of a picture: text before JSON."""
    candidates = [picture.with_suffix(suffix) for suffix in (*_TEXT_SUFFIXES, ".json")]
    return [candidate for candidate in candidates if candidate.is_file()]


def _read_caption(files: list[Path], encoding: str | None) -> str | None:
    """Return the first caption in the files that is not empty."""
    for file in files:
        text = read_text(file, encoding).strip("\ufeff \t\r\n")
        if file.suffix.lower() == ".json":
            text = _parse_caption(file, text)
        if text:
            return text
    return None


def _parse_caption(file: Path, text: str) -> str:
    try:
        record = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not readable as json ({error}). Write it again, or remove it.") from error
    if not isinstance(record, dict):
        return ""
    return next((record[name] for name in _JSON_CAPTIONS if record.get(name) and isinstance(record[name], str)), "")


def _take_turns(pictures: list[Path], classes: Mapping[Path, str]) -> list[Path]:
    """Return the pictures one class after the other in turns, so that the first rows are not all of one class."""
    seen: Counter[str] = Counter()
    places = []
    for picture in pictures:
        name = classes.get(picture, "")
        places.append((seen[name], name, picture))
        seen[name] += 1
    return [picture for _, _, picture in sorted(places)]
