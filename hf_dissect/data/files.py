"""Read what a local folder holds: tables of captions, with the pictures inside or next to them, or pictures alone.

No picture is decoded. Written by hand is what `datasets.load_dataset` does not do: resolve image paths in a column of
any name and outside the folder (its `imagefolder` takes only `file_name`, and only paths inside), and split one
metadata file by the folders of its pictures. `split_files` decides which file belongs to which split, `table_files`
reads them.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Value

from hf_dissect.data.coco import CAPTION_FORMATS, find_caption_format, read_caption_files
from hf_dissect.data.pair_columns import IMAGE_COLUMNS
from hf_dissect.data.picture_folders import PICTURE_SUFFIXES, read_pictures, walk_files
from hf_dissect.data.picture_paths import make_paths_absolute
from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.saved_datasets import is_saved_dataset, read_saved_dataset
from hf_dissect.data.split_files import (
    find_split,
    group_by_split,
    join_names,
    list_folder,
    require_path,
    split_by_folder,
)
from hf_dissect.data.table_files import STATS, TABLE_FORMATS, find_table_format, find_tables, read_tables
from hf_dissect.data.tables.json_rows import load_json
from hf_dissect.data.tables.text_file import COMPRESSED

METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
FILE_NAME_COLUMN = "file_name"
SPLIT_COLUMN = "split"

_READABLE = (
    f"tables ({', '.join(TABLE_FORMATS)}, text also as {COMPRESSED}), captions as of COCO, folders written by "
    "save_to_disk or img2dataset, pictures with a .txt each, or class folders (dog/0.jpg)"
)

logger = logging.getLogger(__name__)


def read_folder(
    path: str, split_names: Mapping[str, str | None], options: ReadingOptions | None = None
) -> dict[str, Dataset]:
    """Read a table file, or what a folder holds, split by file name or subfolder (`train*`, `val*`, `test*`).

    A folder may hold tables, caption files as of COCO, data written by `save_to_disk` or by img2dataset as files, or
    pictures with captions next to them or in class folders. A file, or a folder that names no split, is all train.

    Args:
        path: File or folder; image paths in the tables are relative to the folder.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        options: How files are read; None for the defaults.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If a file is unreadable or there is no train split.
    """
    options, root = options or ReadingOptions(), require_path(path)
    if root.is_file():
        kind = find_table_format(root) or ("csv" if root.suffix.lower() == ".txt" else None)
        if kind is None:
            raise ValueError(f"data.path {path!r} is not a table: {', '.join(TABLE_FORMATS)} files can be read.")
        return _read_table_files([root], {root: kind}, root.parent, None, split_names, options)
    if is_saved_dataset(root):
        splits = read_saved_dataset(root, split_names)
        return {split: _resolve_pictures(rows, root, options) for split, rows in splits.items()}
    files = walk_files(root)
    tables = find_tables(files, root)
    if tables:
        kinds = {file: str(find_table_format(file)) for file in tables}
        return _read_table_files(tables, kinds, root, split_names, split_names, options)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    rows = read_pictures(root, pictures, split_names, options) if pictures else None
    if rows is None:
        raise FileNotFoundError(_describe_unreadable(path, root, files))
    return rows


def read_image_folder(
    path: str, split_names: Mapping[str, str | None], options: ReadingOptions | None = None
) -> dict[str, Dataset]:
    """Read `metadata.csv`, `.tsv`, `.jsonl` or `.parquet` next to the pictures, in the folder or one for each split.

    A single file for all splits is split by the folders of its pictures (`train/0.jpg`, `test/0.jpg`). Without
    metadata, the pictures have their captions next to them or are in class folders, see `read_pictures`.

    Args:
        path: Folder.
        split_names: Name of "train", "validation" and "test" at the source; None leaves a split out.
        options: How files are read; None for the defaults. Without an image column, `file_name` becomes `image`.

    Raises:
        FileNotFoundError: If there is no metadata file.
        ValueError: If a metadata file is unreadable or names no pictures, or there is no train split.
    """
    options, root = options or ReadingOptions(), require_path(path)
    folders = [root, *sorted(child for child in root.glob("*") if child.is_dir() and not child.name.startswith("."))]
    tables = [folder / name for folder in folders for name in METADATA_NAMES if (folder / name).is_file()]
    if not tables:
        return _read_without_metadata(path, root, split_names, options)
    found = group_by_split(tables, root, split_names)
    for split, files in found.items():
        if len(files) > 1:
            raise ValueError(
                f"data.path {path!r} holds several metadata files for {split}: {join_names(files)}. Keep one."
            )
    kinds = {file: str(find_table_format(file)) for files in found.values() for file in files}
    splits = {}
    for split, rows in read_tables(found, kinds, options).items():
        (file,) = found[split]
        column = options.image_column or "image"
        if column not in rows.column_names:
            if options.image_column or FILE_NAME_COLUMN not in rows.column_names:
                raise ValueError(
                    f"{str(file)!r} has no column {options.image_column or FILE_NAME_COLUMN!r}, which must name the "
                    f"pictures; it has {rows.column_names}."
                )
            rows = rows.rename_column(FILE_NAME_COLUMN, column)
        parts = _split_by_pictures(rows, column, split_names) if file.parent == root else {split: rows}
        for part, members in parts.items():
            splits[part] = make_paths_absolute(members, column, options.picture_root(file.parent))
    return splits


def holds_tar_shards_of_img2dataset(path: str) -> bool:
    """Return whether a folder holds tar shards with the tables and statistics that img2dataset writes next to them."""
    root = Path(path).expanduser()
    return root.is_dir() and any(
        Path(f"{shard.with_suffix('')}{STATS}").is_file() or shard.with_suffix(".parquet").is_file()
        for pattern in ("*.tar", "*/*.tar")
        for shard in root.glob(pattern)
    )


def _read_table_files(
    tables: list[Path],
    kinds: dict[Path, str],
    root: Path,
    file_splits: Mapping[str, str | None] | None,
    split_names: Mapping[str, str | None],
    options: ReadingOptions,
) -> dict[str, Dataset]:
    """Read the tables of a folder, or captions as of COCO; without `file_splits`, all of a file is train."""
    contents = {file: _load_json_if_whole(file, options.encoding) for file in tables if kinds[file] == "json"}
    formats = {file: find_caption_format(content) for file, content in contents.items()}
    if any(kind in CAPTION_FORMATS for kind in formats.values()):
        captions = {file: contents[file] for file in tables if formats.get(file) in CAPTION_FORMATS}
        others = [file for file in tables if file not in captions]
        if others:
            logger.warning("Left out, next to files of captions as of COCO: %s", join_names(others))
        return read_caption_files(captions, root, split_names, options)
    if "objects" in formats.values():
        raise ValueError(
            f"{join_names(formats)}: annotations without captions. Name the file of COCO whose annotations have a "
            '"caption", such as captions_train2017.json.'
        )
    found = {"train": tables} if file_splits is None else group_by_split(tables, root, file_splits)
    splits = read_tables(found, {file: kinds[file] for files in found.values() for file in files}, options)
    if list(splits) == ["train"]:
        _report_split_column(splits["train"], split_names)
    return {split: _resolve_pictures(rows, root, options) for split, rows in splits.items()}


def _resolve_pictures(rows: Dataset, root: Path, options: ReadingOptions) -> Dataset:
    return make_paths_absolute(rows, find_image_column(rows, options.image_column), options.picture_root(root))


def find_image_column(rows: Dataset | IterableDataset, image_column: str | None) -> str:
    """Return the given name, or else the first usual name that is a column of the rows, or "image"."""
    return image_column or next((name for name in IMAGE_COLUMNS if name in (rows.column_names or ())), "image")


def _load_json_if_whole(file: Path, encoding: str | None) -> Any:
    """Return the content of a JSON file, None if it is damaged, which matters only if it is read as a table."""
    try:
        return load_json(file, encoding)
    except ValueError:
        return None


def _read_without_metadata(
    path: str, root: Path, split_names: Mapping[str, str | None], options: ReadingOptions
) -> dict[str, Dataset]:
    files = walk_files(root) if root.is_dir() else []
    tables = find_tables(files, root)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    rows = read_pictures(root, pictures, split_names, options) if pictures and not tables else None
    if rows is None:
        table = f"Set data.source to folder to read {join_names(tables)}, or write" if tables else "Write"
        raise FileNotFoundError(
            f"data.path {path!r} holds none of {', '.join(METADATA_NAMES)}, neither itself nor in a subfolder; found "
            f"{list_folder(root) if root.is_dir() else 'a file'}. {table} one with the columns {FILE_NAME_COLUMN} and "
            "caption, or give each picture its caption in a .txt of the same name, or put the pictures in class "
            "folders (dog/0.jpg)."
        )
    return rows


def _split_by_pictures(rows: Dataset, column: str, split_names: Mapping[str, str | None]) -> dict[str, Dataset]:
    """Return the rows by split where the folders of the pictures name splits; otherwise all are train."""
    if not (isinstance(rows.features[column], Value) and "string" in rows.features[column].dtype):
        return {"train": rows}
    names = [name if name is None else name.replace("\\", "/") for name in rows[column]]
    indices = split_by_folder(names, split_names)
    return {split: rows.select(members).flatten_indices() for split, members in indices.items()} or {"train": rows}


def _report_split_column(rows: Dataset, split_names: Mapping[str, str | None]) -> None:
    """Warn about a column that seems to hold splits, so that nobody trains on test pairs without knowing."""
    feature = rows.features.get(SPLIT_COLUMN)
    if isinstance(feature, Value) and feature.dtype == "string":
        values = [value for value in rows.unique(SPLIT_COLUMN) if value]
        if len(values) > 1 and all(find_split(value, split_names) != "" for value in values):
            logger.warning(
                "The column %r holds %s, but all rows are read as train: write one file for each split (train.csv, "
                "test.csv) to keep them apart.",
                SPLIT_COLUMN,
                ", ".join(sorted(values)),
            )


def _describe_unreadable(path: str, root: Path, files: list[Path]) -> str:
    suffixes = Counter(file.suffix.lower() or file.name for file in files)
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in suffixes.most_common(6))
    found = list_folder(root) + (f" ({counts})" if counts else "")
    if ".tar" in suffixes:
        advice = "Name another folder, or set data.source to webdataset."
    elif suffixes.keys() & set(PICTURE_SUFFIXES):
        advice = (
            "The pictures have neither captions nor classes: write a table with the columns image and caption, or a "
            ".txt of the same name next to each picture, or put the pictures in class folders."
        )
    else:
        advice = "Name another folder, or write one."
    tables = ", ".join(TABLE_FORMATS)
    return f"data.path {path!r} holds no {tables} file; found {found}. {advice} Can be read: {_READABLE}."
