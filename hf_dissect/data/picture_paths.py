"""Make the paths of pictures in a table absolute, as the machine that reads them needs them."""

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image

from hf_dissect.data.arrow_columns import replace_column

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def make_paths_absolute(rows: Dataset, column: str, folder: Path) -> Dataset:
    """Return the rows with image paths made absolute; missing files only show when a picture is read.

    Args:
        rows: Table of any columns.
        column: Column with images or their paths; rows without it are returned as they are.
        folder: Folder to which the paths are relative.

    Raises:
        ValueError: If the column holds nothing but web addresses.
    """
    if column not in rows.column_names:
        return rows
    chunks = rows.data.table.column(column).chunks  # read_column would copy pictures into memory
    images = [image for image in map(_to_image_storage, chunks) if image is not None]
    if len(images) < len(chunks) or not any(_has_file_paths(image) for image in images):
        return rows
    _check_not_all_on_the_web(column, images)
    return replace_column(
        rows, column, pa.chunked_array([_resolve_paths(image, folder) for image in images]), Image(decode=False)
    )


def resolve_path(path: str, folder: str) -> str:
    """Return a path with its folder; one of Windows takes the slashes of this machine unless a file has that name.

    Args:
        path: Path, absolute or relative; an address with a protocol is returned as it is.
        folder: Folder to which it is relative.
    """
    if ":" not in path and "\\" not in path and path[:1] not in ("/", "~"):
        return f"{folder}{os.sep}{path}" if path else folder
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" in path:
        return path
    if os.sep != "\\" and "\\" in path:
        if _DRIVE.match(path):  # a place on another machine, which the message of a missing picture shall name
            return path
        if not os.path.exists(os.path.join(folder, path)):
            path = path.replace("\\", "/")
    return os.path.join(folder, os.path.expanduser(path) if path.startswith("~") else path)


def _to_image_storage(values: pa.Array) -> pa.StructArray | None:
    """Return the values as bytes and path, or None if they are not images."""
    kind = values.type
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_path or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0):
        return Image().cast_storage(values)
    return None


def _has_file_paths(image: pa.StructArray) -> bool:
    return bool(pc.any(pc.and_(pc.is_null(image.field("bytes")), pc.is_valid(image.field("path")))).as_py())


def _check_not_all_on_the_web(column: str, images: list[pa.StructArray]) -> None:
    paths = [image.field("path").filter(pc.is_null(image.field("bytes"))) for image in images]
    if all(pc.all(pc.match_substring_regex(each, "^https?://"), min_count=0).as_py() for each in paths):
        first = next(path for each in paths for path in each.to_pylist() if path is not None)
        raise ValueError(
            f"image_column={column!r} holds web addresses such as {first!r}, not files. Download the pictures first, "
            "for example with img2dataset, whose output folder can be read; or name another column with "
            "data.image_column."
        )


def _resolve_paths(image: pa.StructArray, folder: Path) -> pa.StructArray:
    base = str(folder.absolute())
    paths = [None if path is None else resolve_path(path, base) for path in image.field("path").to_pylist()]
    fields = [image.field("bytes"), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=image.is_null())
