"""Turn text files into data sets in the cache of `datasets`, so that a large file is read only once."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError

from hf_dissect.data.arrow_columns import replace_column
from hf_dissect.data.reading_options import ReadingOptions
from hf_dissect.data.tables.column_types import JsonColumnType, TextColumnType
from hf_dissect.data.tables.delimited import Layout, find_layout, iterate_rows
from hf_dissect.data.tables.json_rows import iterate_json_rows

_ROWS_AT_ONCE = 10_000
_FORM = 2  # to be raised when the same files give other rows, so that an older cache is not read


@dataclass(frozen=True)
class _TextFile:
    """File of a table; size and time let the cache notice a file that changed."""

    path: Path
    kind: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, kind: str) -> "_TextFile":
        """Return the file as it is now."""
        status = path.stat()
        return cls(path.absolute(), kind, status.st_size, status.st_mtime_ns)


def read_text_tables(
    splits: Mapping[str, list[Path]], kinds: Mapping[Path, str], options: ReadingOptions
) -> dict[str, Dataset]:
    """Read files of delimited text or JSON as one table a split.

    A column of delimited text has one type in all splits, except for that of the ids.

    Args:
        splits: Files of each split.
        kinds: "csv", "json" or "jsonl" for each file, of one format in a split.
        options: Separator, encoding and names of columns.

    Raises:
        ValueError: If a file is unreadable, or the files of a split have different columns or no rows.
    """
    given = {split: tuple(_TextFile.of(file, kinds[file]) for file in files) for split, files in splits.items()}
    tables = {split: _read_cached(files, options) for split, files in given.items()}
    delimited = {split: tables[split] for split, files in given.items() if files[0].kind == "csv"}
    return {**tables, **_type_columns(delimited, options)}


def _type_columns(tables: Mapping[str, Dataset], options: ReadingOptions) -> dict[str, Dataset]:
    """Return tables of strings with numbers, true and false where a column holds nothing else."""
    types: dict[tuple[str, str], TextColumnType] = {}
    for split, rows in tables.items():
        for name in rows.column_names:
            types.setdefault(_type_key(split, name, options), TextColumnType(_find_kind(name, options))).add(
                rows.data.table.column(name)
            )
    typed = dict(tables)
    for split, rows in tables.items():
        for name in rows.column_names:
            column_type = types[_type_key(split, name, options)]
            if column_type.feature.dtype != "string":
                values = column_type.convert(rows.data.table.column(name))
                typed[split] = replace_column(typed[split], name, values, column_type.feature)
    return typed


def _type_key(split: str, name: str, options: ReadingOptions) -> tuple[str, str]:
    # Ids of one split say nothing of another, and must not depend on which splits are read.
    return (split if name == options.id_column else "", name)


def _find_kind(name: str, options: ReadingOptions) -> str:
    if name in (options.id_column, options.task_column):
        return "names"
    if name == options.clean_column:
        return "any"
    return "text" if name in options.text_columns else "names" if name in options.name_columns else "any"


def _read_cached(files: tuple[_TextFile, ...], options: ReadingOptions) -> Dataset:
    if files[0].kind == "csv":
        builder = _DelimitedTable(files=files, options=options)
    else:
        builder = _JsonTable(files=files, options=options)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError) and not isinstance(cause, pa.ArrowException):
            raise cause from None  # ours, with file and line
        names = ", ".join(str(file.path) for file in files)
        raise ValueError(f"{names}: not readable ({cause}).") from error
    if not builder.info.splits["train"].num_examples:
        names = ", ".join(str(file.path) for file in files)
        raise ValueError(f"{names}: no rows, only a header. Remove it, or write it again.")
    return builder.as_dataset(split="train")


@dataclass
class _TextTableConfig(datasets.BuilderConfig):
    files: tuple[_TextFile, ...] = ()
    options: ReadingOptions = ReadingOptions()
    form: int = _FORM


class _TextTable(datasets.ArrowBasedBuilder):
    """Builder that writes the rows of text files into the cache; the columns are found when there is none yet."""

    BUILDER_CONFIG_CLASS = _TextTableConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.info.features = self._find_features()
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"files": list(self.config.files)})]

    def _find_features(self) -> Features:
        raise NotImplementedError


class _DelimitedTable(_TextTable):
    """Builder of delimited text, all of it strings; an empty field is None."""

    def _find_features(self) -> Features:
        options = self.config.options
        self._layouts: dict[Path, Layout] = {}
        first: Layout | None = None
        for file in self.config.files:
            layout = find_layout(file.path, options.separator, options.encoding, options.unique_columns)
            first = first or layout
            if set(layout.names) != set(first.names):
                raise ValueError(
                    f"{str(file.path)!r} has the columns {', '.join(layout.names)}, but "
                    f"{self.config.files[0].path.name} has {', '.join(first.names)}. All files of a split must be "
                    "whole and have the same columns."
                )
            self._layouts[file.path] = layout
        return Features({name: Value("string") for name in (first.names if first else ())})

    def _generate_tables(self, files: list[_TextFile]) -> Iterator[tuple[Key, pa.Table]]:
        for place, file in enumerate(files):
            layout = self._layouts[file.path]
            rows = iterate_rows(file.path, layout, self.config.options.encoding)
            for number in itertools.count():
                some = list(itertools.islice(rows, _ROWS_AT_ONCE))
                if not some:
                    break
                fields = [pa.array(values, pa.string()) for values in zip(*some, strict=True)]
                columns = [pc.if_else(pc.equal(values, ""), None, values) for values in fields]
                table = pa.table(dict(zip(layout.names, columns, strict=True)))
                yield Key(place, number), table.select(list(self.info.features))


class _JsonTable(_TextTable):
    """Builder of JSON, whose types are found in a pass of its own."""

    def _find_features(self) -> Features:
        self._types: dict[str, JsonColumnType] = {}
        num_rows = 0
        for file in self.config.files:
            for length, batch in self._iterate_batches(file, warns=True):
                num_rows += length
                for name, values in batch.items():
                    kind = _find_kind(name, self.config.options)
                    self._types.setdefault(name, JsonColumnType(kind)).add(values)
        if not num_rows or not self._types:
            names = ", ".join(str(file.path) for file in self.config.files)
            raise ValueError(f"{names}: no rows. Remove it, or write it again.")
        return Features({name: column_type.feature for name, column_type in self._types.items()})

    def _generate_tables(self, files: list[_TextFile]) -> Iterator[tuple[Key, pa.Table]]:
        for place, file in enumerate(files):
            for number, (length, batch) in enumerate(self._iterate_batches(file, warns=False)):
                columns = {name: kind.convert(batch.get(name, [None] * length)) for name, kind in self._types.items()}
                yield Key(place, number), pa.table(columns)

    def _iterate_batches(self, file: _TextFile, warns: bool) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """Yield the number and the columns of some rows at a time; a row without a column has None there."""
        rows = iterate_json_rows(file.path, self.config.options.encoding, lines=file.kind == "jsonl", warns=warns)
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            names = dict.fromkeys(name for row in some for name in row)
            yield len(some), {name: [row.get(name) for row in some] for name in names}
