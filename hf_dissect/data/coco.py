"""Read caption files of COCO, and the splits of them and of Flickr8k and Flickr30k that Karpathy made."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from hf_dissect.data.picture_paths import resolve_path
from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.split_files import find_split, group_by_split, join_names

CAPTION_FORMATS = ("coco", "karpathy")
_BEFORE_SPLIT = re.compile(r"^(captions?|annotations?|coco|dataset)[_-]+", re.IGNORECASE)
_REST_OF_VALIDATION = "restval"  # pictures of COCO's validation split that are trained on

logger = logging.getLogger(__name__)


def find_caption_format(content: Any) -> str | None:
    """Return the format of a JSON file: "coco" or "karpathy", "objects" for COCO without captions, or None."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return None
    images = [image for image in content["images"] if isinstance(image, dict)]
    if any("sentences" in image for image in images):
        return "karpathy"
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        return None
    has_captions = any(isinstance(each, dict) and "caption" in each for each in annotations)
    return "coco" if has_captions else "objects"


def read_caption_files(
    contents: Mapping[Path, Any], root: Path, split_names: Mapping[str, str | None], options: ReadingOptions
) -> dict[str, Dataset]:
    """Read the rows of COCO's or Karpathy's files by split, with the columns `image`, `captions` and `image_id`.

    Args:
        contents: Content of each file; all have the same format.
        root: Folder of the files, in or next to which the pictures lie.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        options: Folder of the pictures and names of the columns.

    Raises:
        ValueError: If a file holds no whole captions, or there is no train split.
    """
    names = (options.image_column or "image", options.caption_column or "captions")
    if find_caption_format(next(iter(contents.values()))) == "karpathy":
        if len(contents) > 1:
            raise ValueError(
                f"data.path {str(root)!r} holds several files with splits: {join_names(contents)}. Keep one."
            )
        ((file, content),) = contents.items()
        parts = _split_karpathy(file, content, split_names)
    else:
        # "captions_train2017.json" begins with the name of its split once the rest is taken off.
        alias: dict[PurePath, Path] = {file.with_name(_BEFORE_SPLIT.sub("", file.name)): file for file in contents}
        grouped = group_by_split(alias, root, split_names) if len(alias) > 1 else {"train": list(alias)}
        parts = {
            split: [row for name in members for row in _read_coco(alias[name], contents[alias[name]], name.stem)]
            for split, members in grouped.items()
        }
    return {split: _make_table(rows, root, options, names) for split, rows in parts.items()}


def _read_coco(file: Path, content: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Return one row a picture, with the folders in which it may lie."""
    rows: dict[Any, dict[str, Any]] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or "id" not in image or not image.get("file_name"):
            raise ValueError(f"{str(file)!r}: an image without id or file_name: {str(image)[:100]}. Mend the file.")
        if image["id"] in rows:
            raise ValueError(f"{str(file)!r}: two images have the id {image['id']!r}. Give each its own.")
        folder = folder.split(".")[0]
        rows[image["id"]] = {"paths": _list_places(folder, image["file_name"]), "captions": [], "id": image["id"]}
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict) or annotation.get("image_id") not in rows:
            raise ValueError(
                f"{str(file)!r}: an annotation whose image_id is not the id of an image: {str(annotation)[:100]}. "
                "Mend the file."
            )
        rows[annotation["image_id"]]["captions"].append(annotation.get("caption"))
    return list(rows.values())


def _split_karpathy(
    file: Path, content: dict[str, Any], split_names: Mapping[str, str | None]
) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {split: [] for split in split_names}
    left_out: dict[str, None] = {}
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not image.get("filename"):
            raise ValueError(f"{str(file)!r}: image {number} has no filename. Mend the file.")
        given = str(image.get("split", "train"))
        split = find_split(given, split_names)
        if given == _REST_OF_VALIDATION and split == "":
            split = "train" if split_names["train"] == "train" else None
        if not split:
            left_out[given] = None
            continue
        captions = [each.get("raw") or " ".join(each.get("tokens", [])) for each in image.get("sentences", [])]
        identity = image.get("cocoid", image.get("imgid", number))
        paths = _list_places(image.get("filepath") or "", image["filename"])
        parts[split].append({"paths": paths, "captions": captions, "id": identity})
    if left_out:
        logger.warning("%s: left out the splits %s.", file, ", ".join(left_out))
    if not parts["train"]:
        raise ValueError(
            f"{str(file)!r} has no pictures of the split {split_names['train']!r}. Set data.train_split to one of its "
            "splits."
        )
    return {split: rows for split, rows in parts.items() if rows}


def _list_places(folder: str, name: str) -> list[str]:
    """Return the paths that a picture may have below the folder of the pictures, the likeliest first."""
    inside = f"{folder}/{name}" if folder else name
    return [name, inside, f"images/{inside}", f"images/{name}", f"Images/{name}"]


def _make_table(rows: list[dict[str, Any]], root: Path, options: ReadingOptions, names: tuple[str, str]) -> Dataset:
    bases = [options.picture_root(root)]
    if options.image_root is None:
        bases.append(root.absolute().parent)  # of a folder `annotations` next to the pictures
    base, place = _find_place([row["paths"] for row in rows[:3]], bases)
    images = [{"bytes": None, "path": resolve_path(row["paths"][place], str(base.absolute()))} for row in rows]
    ids = [row["id"] for row in rows]
    whole = all(isinstance(each, int) for each in ids)
    columns = {
        names[0]: images,
        names[1]: [row["captions"] for row in rows],
        "image_id": ids if whole else list(map(str, ids)),
    }
    kind = Value("int64" if whole else "string")
    features = Features({names[0]: Image(decode=False), names[1]: List(Value("string")), "image_id": kind})
    return Dataset.from_dict(columns, features)


def _find_place(examples: Iterable[list[str]], bases: list[Path]) -> tuple[Path, int]:
    """Return the folder and the number of the path at which one of the first pictures lies; the first if none does."""
    examples = list(examples)
    for base in bases:
        for paths in examples:
            for place, path in enumerate(paths):
                if (base / path).is_file():
                    return base, place
    return bases[0], 0
