"""Turn text files into data sets in the cache of `datasets`, in two passes: types of the columns, then rows."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError

from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.tables.column_types import JsonColumnType, TextColumnType
from hf_dissect.data.tables.delimited import Layout, find_layout, iterate_rows
from hf_dissect.data.tables.json_rows import iterate_json_rows

_ROWS_AT_ONCE = 10_000
_FORM = 1  # to be raised when the same files give other rows, so that an older cache is not read


@dataclass(frozen=True)
class _TextFile:
    """File of a table; size and time let the cache notice a file that changed."""

    path: Path
    size: int
    changed: int
    kind: str
    encoding: str | None
    layout: Layout | None


def read_text_tables(
    splits: Mapping[str, list[Path]], kinds: Mapping[Path, str], options: ReadingOptions
) -> dict[str, Dataset]:
    """Read files of delimited text or JSON as one table a split.

    A column has one type in all splits, except for that of the ids.

    Args:
        splits: Files of each split.
        kinds: "csv", "json" or "jsonl" for each file.
        options: Separator, encoding and names of columns.

    Raises:
        ValueError: If a file is unreadable, or the files of a split have different columns or no rows.
    """
    types: dict[tuple[bool, str, str], TextColumnType | JsonColumnType] = {}
    found = {split: [_inspect(file, kinds[file], options) for file in files] for split, files in splits.items()}
    columns = {split: _add_types(split, files, options, types) for split, files in found.items()}
    return {
        split: _read_cached(tuple(files), {name: types[key] for name, key in columns[split].items()})
        for split, files in found.items()
    }


def _inspect(file: Path, kind: str, options: ReadingOptions) -> _TextFile:
    status = file.stat()
    layout = None
    if kind == "csv":
        layout = find_layout(file, options.separator, options.encoding, options.unique_columns)
    return _TextFile(file.absolute(), status.st_size, status.st_mtime_ns, kind, options.encoding, layout)


def _add_types(
    split: str,
    files: list[_TextFile],
    options: ReadingOptions,
    types: dict[tuple[bool, str, str], TextColumnType | JsonColumnType],
) -> dict[str, tuple[bool, str, str]]:
    """Read the files of a split, note the types of their columns, and return the keys of these by column."""
    columns: dict[str, tuple[bool, str, str]] = {}
    num_rows = 0
    for file in files:
        if file.layout and columns and set(file.layout.names) != set(columns):
            raise ValueError(
                f"{str(file.path)!r} has the columns {', '.join(file.layout.names)}, but {files[0].path.name} has "
                f"{', '.join(columns)}. All files of a split must be whole and have the same columns."
            )
        for name in file.layout.names if file.layout else ():
            columns.setdefault(name, (True, split if name == options.id_column else "", name))
        for batch in _iterate_batches(file):
            num_rows += len(next(iter(batch.values()), []))
            for name, values in batch.items():
                # Ids of one split say nothing of another, and must not depend on it.
                key = (file.layout is not None, split if name == options.id_column else "", name)
                columns.setdefault(name, key)
                if key not in types:
                    make = JsonColumnType if file.layout is None else TextColumnType
                    types[key] = make(_find_kind(name, options))
                types[key].add(values)
    if not num_rows:
        names = ", ".join(str(file.path) for file in files)
        raise ValueError(f"{names}: no rows{', only a header' if columns else ''}. Remove it, or write it again.")
    return columns


def _find_kind(name: str, options: ReadingOptions) -> str:
    if name in (options.id_column, options.task_column):
        return "names"
    if name == options.clean_column:
        return "any"
    return "text" if name in options.text_columns else "names" if name in options.name_columns else "any"


def _iterate_batches(file: _TextFile) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of some rows at a time; a row of JSON without a column has None there."""
    rows: Iterator[Any]
    if file.layout is not None:
        rows = iterate_rows(file.path, file.layout, file.encoding)
    else:
        rows = iterate_json_rows(file.path, file.encoding, lines=file.kind == "jsonl")
    while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        if file.layout is not None:
            yield {name: list(values) for name, values in zip(file.layout.names, zip(*some, strict=True), strict=True)}
        else:
            names = dict.fromkeys(name for row in some for name in row)
            yield {name: [row.get(name) for row in some] for name in names}


@dataclass
class _TextTableConfig(datasets.BuilderConfig):
    files: tuple[_TextFile, ...] = ()
    types: dict[str, TextColumnType | JsonColumnType] = field(default_factory=dict)
    features: Features | None = None
    form: int = _FORM


class _TextTable(datasets.ArrowBasedBuilder):
    """Builder that writes the rows of text files into the cache."""

    BUILDER_CONFIG_CLASS = _TextTableConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"files": list(self.config.files)})]

    def _generate_tables(self, files: list[_TextFile]) -> Iterator[tuple[Key, pa.Table]]:
        for place, file in enumerate(files):
            for number, batch in enumerate(_iterate_batches(file)):
                length = len(next(iter(batch.values())))
                columns = {
                    name: kind.convert(batch.get(name, [None] * length)) for name, kind in self.config.types.items()
                }
                yield Key(place, number), pa.table(columns)


def _read_cached(files: tuple[_TextFile, ...], types: dict[str, TextColumnType | JsonColumnType]) -> Dataset:
    features = Features({name: kind.feature for name, kind in types.items()})
    builder = _TextTable(files=files, types=types, features=features)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        names = ", ".join(str(file.path) for file in files)
        raise ValueError(f"{names}: not readable ({error.__cause__ or error}).") from error
    return builder.as_dataset(split="train")
