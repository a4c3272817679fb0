"""Read local tables of captions, with the pictures inside or next to them, without decoding a picture.

`datasets.load_dataset` reads the rows. Written by hand is what it does not do: name the broken one among many files,
resolve image paths in a column of any name and outside the folder (its `imagefolder` takes only `file_name`, and only
paths inside), and split one metadata file by the folders of its pictures. `split_files` decides which file belongs to
which split.
"""

import glob
import os
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image, IterableDataset, Value

from hf_dissect.data.arrow_columns import replace_column
from hf_dissect.data.pair_columns import IMAGE_COLUMNS
from hf_dissect.data.split_files import (
    group_by_split,
    join_names,
    list_folder,
    require_path,
    split_by_folder,
    summarize_error,
)

TABLE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME_COLUMN = "file_name"

_OTHER_SOURCES = {".tar": "webdataset", ".jpg": "imagefolder", ".jpeg": "imagefolder", ".png": "imagefolder"}


def read_folder(
    path: str, split_names: Mapping[str, str | None], image_column: str | None = None
) -> dict[str, Dataset]:
    """Read a table file, or a folder of them, split by file name or subfolder (`train*`, `val*`, `test*`).

    A file, or a folder that names no split, is all train.

    Args:
        path: File or folder; image paths in the tables are relative to the folder.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        image_column: Column with the images or their paths; None recognises the usual names.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If a file is unreadable or there is no train split.
    """
    root = require_path(path)
    if root.is_file():
        if root.suffix.lower() not in TABLE_FORMATS:
            raise ValueError(f"data.path {path!r} is not a table: {', '.join(TABLE_FORMATS)} files can be read.")
        found = {"train": [root]}
        root = root.parent
    else:
        found = group_by_split(_list_tables(root), root, split_names)
    splits = {}
    for split, files in found.items():
        rows = read_tables(files)
        splits[split] = make_paths_absolute(rows, find_image_column(rows, image_column), root)
    return splits


def read_image_folder(
    path: str, split_names: Mapping[str, str | None], image_column: str | None = None
) -> dict[str, Dataset]:
    """Read `metadata.csv`, `.jsonl` or `.parquet` next to the pictures, in the folder or in a subfolder per split.

    A single file for all splits is split by the folders of its pictures (`train/0.jpg`, `test/0.jpg`).

    Args:
        path: Folder.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        image_column: Column with the paths of the pictures, relative to the metadata; None takes `file_name`, which
            becomes `image`.

    Raises:
        FileNotFoundError: If there is no metadata file.
        ValueError: If a metadata file is unreadable or names no pictures, or there is no train split.
    """
    root = require_path(path)
    folders = [root, *sorted(child for child in root.glob("*") if child.is_dir())]
    tables = [folder / name for folder in folders for name in METADATA_NAMES if (folder / name).is_file()]
    if not tables:
        raise FileNotFoundError(
            f"data.path {path!r} holds none of {', '.join(METADATA_NAMES)}, neither itself nor in a subfolder; found "
            f"{list_folder(root)}. Write one with the columns {FILE_NAME_COLUMN} and caption."
        )
    splits = {}
    for split, files in group_by_split(tables, root, split_names).items():
        if len(files) > 1:
            raise ValueError(
                f"data.path {path!r} holds several metadata files for {split}: {join_names(files)}. Keep one."
            )
        rows = read_tables(files)
        column = image_column or "image"
        if column not in rows.column_names:
            if image_column or FILE_NAME_COLUMN not in rows.column_names:
                raise ValueError(
                    f"{str(files[0])!r} has no column {image_column or FILE_NAME_COLUMN!r}, which must name the "
                    f"pictures; it has {rows.column_names}."
                )
            rows = rows.rename_column(FILE_NAME_COLUMN, column)
        describes_all = files[0].parent == root
        parts = _split_by_pictures(rows, column, split_names) if describes_all else {split: rows}
        for part, members in parts.items():
            splits[part] = make_paths_absolute(members, column, files[0].parent)
    return splits


def read_tables(files: list[Path]) -> Dataset:
    """Read table files of one format and join their rows.

    Raises:
        ValueError: If the formats differ or a file is unreadable.
    """
    kinds = {TABLE_FORMATS[file.suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"The files of one split must have one format, found {join_names(files)}. Keep one of the formats."
        )
    kind = kinds.pop()
    for file in files:
        _check_readable(file, kind)
    try:
        patterns = [glob.escape(str(file.absolute())) for file in files]
        return datasets.load_dataset(kind, data_files={"train": patterns}, split="train")
    except Exception as error:  # pandas, pyarrow and datasets each have their own
        reason = summarize_error(error.__cause__ or error)
        raise ValueError(
            f"{join_names(files)}: not readable as {kind} ({reason}). All files of a split must be whole and have "
            "the same columns."
        ) from error


def find_image_column(rows: Dataset | IterableDataset, image_column: str | None) -> str:
    """Return the given name, or else the first usual name that is a column of the rows, or "image"."""
    return image_column or next((name for name in IMAGE_COLUMNS if name in (rows.column_names or ())), "image")


def make_paths_absolute(rows: Dataset, column: str, folder: Path) -> Dataset:
    """Return the rows with image paths made absolute; missing files only show when a picture is read.

    Args:
        rows: Table of any columns.
        column: Column with images or their paths; rows without it are returned as they are.
        folder: Folder to which the paths are relative.
    """
    if column not in rows.column_names:
        return rows
    chunks = rows.data.table.column(column).chunks  # read_column would copy pictures into memory
    images = [image for image in map(_to_image_storage, chunks) if image is not None]
    if len(images) < len(chunks) or not any(_has_file_paths(image) for image in images):
        return rows
    return replace_column(
        rows, column, pa.chunked_array([_resolve_paths(image, folder) for image in images]), Image(decode=False)
    )


def _split_by_pictures(rows: Dataset, column: str, split_names: Mapping[str, str | None]) -> dict[str, Dataset]:
    """Return the rows by split where the folders of the pictures name splits; otherwise all are train."""
    if not (isinstance(rows.features[column], Value) and "string" in rows.features[column].dtype):
        return {"train": rows}
    indices = split_by_folder(rows[column], split_names)
    return {split: rows.select(members).flatten_indices() for split, members in indices.items()} or {"train": rows}


def _check_readable(file: Path, kind: str) -> None:
    """Check one of many files before any is read, so that the error names the broken one."""
    if file.stat().st_size == 0:
        raise ValueError(f"{str(file)!r} is empty (0 bytes). Remove it, or write it again.")
    if kind != "parquet":
        return
    try:
        pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{str(file)!r} is not a readable Parquet file ({summarize_error(error)}). It may be cut off: copy it "
            "again."
        ) from error


def _to_image_storage(values: pa.Array) -> pa.StructArray | None:
    """Return the values as bytes and path, or None if they are not images."""
    kind = values.type
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_path or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0):
        return Image().cast_storage(values)
    return None


def _has_file_paths(image: pa.StructArray) -> bool:
    return bool(pc.any(pc.and_(pc.is_null(image.field("bytes")), pc.is_valid(image.field("path")))).as_py())


def _resolve_paths(image: pa.StructArray, folder: Path) -> pa.StructArray:
    base = str(folder.absolute())
    paths = [
        path if path is None or "://" in path else os.path.join(base, path) for path in image.field("path").to_pylist()
    ]
    fields = [image.field("bytes"), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=image.is_null())


def _list_tables(root: Path) -> list[Path]:
    """Return the table files in the folder and its subfolders.

    Raises:
        FileNotFoundError: If there is none; the message names the source that reads the files found instead.
    """
    inside = [file for pattern in ("*", "*/*") for file in root.glob(pattern) if not file.name.startswith(".")]
    tables = [file for file in inside if file.suffix.lower() in TABLE_FORMATS and file.is_file()]
    if not tables:
        other = next((_OTHER_SOURCES[f.suffix.lower()] for f in inside if f.suffix.lower() in _OTHER_SOURCES), None)
        advice = f"set data.source to {other}" if other else "write one"
        raise FileNotFoundError(
            f"data.path {str(root)!r} holds no {', '.join(TABLE_FORMATS)} file; found {list_folder(root)}. Name "
            f"another folder, or {advice}."
        )
    return tables
