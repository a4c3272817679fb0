"""Read files of tables, Parquet or text, and name the broken one among many."""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from hf_dissect.data.picture_folders import PICTURE_SUFFIXES, is_sidecar
from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.split_files import join_names, summarize_error
from hf_dissect.data.tables.text_file import COMPRESSED
from hf_dissect.data.tables.text_tables import read_text_tables

TABLE_FORMATS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
STATS = "_stats.json"
"""End of the names of the files that img2dataset writes, one a shard."""

_NOT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_DEPTH = 2  # of the folders in which tables are found, where the given one is the first


def find_table_format(file: PurePath) -> str | None:
    """Return "parquet", "json", "jsonl" or "csv" for a file of a table, None for others."""
    compressed = file.suffix.lower() == COMPRESSED
    kind = TABLE_FORMATS.get(file.with_suffix("").suffix.lower() if compressed else file.suffix.lower())
    return None if compressed and kind == "parquet" else kind


def find_tables(files: Iterable[Path], root: Path) -> list[Path]:
    """Return the tables in a folder and its subfolders, without what describes a single picture or a shard.

    Args:
        files: All files in the folder.
        root: Folder.
    """
    files = list(files)
    stems: set[PurePath] = {file.with_suffix("") for file in files if file.suffix.lower() in PICTURE_SUFFIXES}
    return [
        file
        for file in files
        if find_table_format(file)
        and len(file.relative_to(root).parts) <= _DEPTH
        and file.name not in _NOT_TABLES
        and not file.name.endswith(STATS)
        and not is_sidecar(file, stems)
        and not _describes_shard(file)
    ]


def read_tables(
    splits: Mapping[str, list[Path]], kinds: Mapping[Path, str], options: ReadingOptions
) -> dict[str, Dataset]:
    """Read table files, those of a split in one format, and join their rows.

    Args:
        splits: Files of each split.
        kinds: Format of each file, see `find_table_format`.
        options: How files are read.

    Raises:
        ValueError: If the formats differ or a file is unreadable.
    """
    for files in splits.values():
        if len({kinds[file].removesuffix("l") for file in files}) > 1:
            raise ValueError(
                f"The files of one split must have one format, found {join_names(files)}. Keep one of the formats."
            )
        for file in files:
            _check_readable(file, kinds[file])
    texts = {split: files for split, files in splits.items() if kinds[files[0]] != "parquet"}
    if options.separator is not None and "csv" not in kinds.values():
        raise ValueError(
            f"data.separator is {options.separator!r}, but {join_names(kinds)} is not delimited text. Leave "
            "data.separator out."
        )
    tables = read_text_tables(texts, kinds, options)
    return {split: tables[split] if split in texts else _read_parquet(files) for split, files in splits.items()}


def _read_parquet(files: list[Path]) -> Dataset:
    try:
        patterns = [glob.escape(str(file.absolute())) for file in files]
        return datasets.load_dataset("parquet", data_files={"train": patterns}, split="train")
    except Exception as error:  # pandas, pyarrow and datasets each have their own
        reason = summarize_error(error.__cause__ or error)
        raise ValueError(
            f"{join_names(files)}: not readable as parquet ({reason}). All files of a split must be whole and have "
            "the same columns."
        ) from error


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


def _describes_shard(file: Path) -> bool:
    """Return whether a table is that of img2dataset on a folder of pictures, which it has no part of."""
    shard = file.with_suffix("")
    return file.suffix == ".parquet" and shard.is_dir() and Path(f"{shard}{STATS}").is_file()
