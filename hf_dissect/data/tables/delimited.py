"""Read comma-, tab- or otherwise separated text, and refuse rows that would shift into wrong columns.

Python's `csv` reads the fields. pandas, behind the "csv" builder of `datasets`, fills short rows in silence, takes the
first field of long rows as an index, and turns a caption "NA" into nothing and an id "007" into a number.
"""

import csv
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from hf_dissect.data.tables.text_file import holds_byte, reading_text

SEPARATORS = (",", "\t", ";", "|")
_WRITTEN_OUT = {"\\t": "\t", "tab": "\t"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Form of a file of delimited text.

    Attributes:
        separator: Character between the fields.
        names: Names of the columns, each once.
        skipped: Number of lines above the header.
        quoted: True if quotes enclose fields; False if a quote is a character like any other.
    """

    separator: str
    names: tuple[str, ...]
    skipped: int = 0
    quoted: bool = True


def read_separator(separator: str) -> str:
    """Return the character that `data.separator` means, where a tab may be written out.

    Raises:
        ValueError: If it is not one character that can separate fields.
    """
    character = _WRITTEN_OUT.get(separator, separator)
    if len(character) != 1 or character in '"\r\n\0':
        raise ValueError(
            f"data.separator is {separator!r}, but must be one character other than a quote or a line end, such as "
            "',' or ';' or tab. Leave it out to take it from the header."
        )
    return character


def find_layout(file: Path, separator: str | None, encoding: str | None, unique: Collection[str] = ()) -> Layout:
    """Read a file once and return its form.

    Args:
        file: File of delimited text.
        separator: Character between the fields; None takes the one that the header holds.
        encoding: See `reading_text`.
        unique: Columns that may occur only once; others get a number, as pandas does it.

    Raises:
        ValueError: If a row has more or fewer fields than the header, quotes are left open, the separator is not
            known, or the file is not text; the message names the file and the line.
    """
    with reading_text(file, encoding) as text:
        skipped, first = _read_first_line(text)
        mark = re.fullmatch(r"sep=(.)", first.strip("\r\n\ufeff"))  # Excel's way to name a separator
        if mark:
            separator, skipped, first = separator or mark[1], skipped + 1, text.readline()
        if not first.strip():
            raise ValueError(f"{str(file)!r} holds no header. Its first line must name the columns.")
        separator = read_separator(separator) if separator else _recognise_separator(file, first)
    layout = Layout(separator, (), skipped)
    with _reading_rows(file, layout, encoding) as rows:
        header = next(rows)
    layout = Layout(separator, _make_unique(file, header, unique), skipped)
    _check_separator(file, layout)
    return _find_quoting(file, layout, encoding)


def iterate_rows(file: Path, layout: Layout, encoding: str | None) -> Iterator[list[str]]:
    """Yield the fields of each row.

    Raises:
        ValueError: See `find_layout`.
    """
    with _reading_rows(file, layout, encoding) as rows:
        next(rows)
        yield from rows


def _read_first_line(text: TextIO) -> tuple[int, str]:
    """Return the number of empty lines at the beginning, and the line that follows."""
    for skipped, line in enumerate(text):
        if line.strip("\r\n \ufeff"):
            return skipped, line
    return 0, ""


@contextmanager
def _reading_rows(file: Path, layout: Layout, encoding: str | None) -> Iterator[Iterator[list[str]]]:
    """Open a file and give its rows, the header first."""
    limit = csv.field_size_limit(2**31 - 1)  # captions may be of any length
    try:
        with reading_text(file, encoding) as text:
            for _ in range(layout.skipped):
                text.readline()
            reader = csv.reader(
                text,
                delimiter=layout.separator,
                quoting=csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE,
                strict=True,
            )
            yield _check_rows(file, layout, reader)
    finally:
        csv.field_size_limit(limit)


def _check_rows(file: Path, layout: Layout, reader: Any) -> Iterator[list[str]]:
    wanted, line = len(layout.names), layout.skipped + 1
    try:
        for row in reader:
            if len(row) > 1 or (row and (row[0].strip() or wanted == 1)):
                wanted = wanted or len(row)  # the header comes first
                if len(row) != wanted:
                    raise ValueError(
                        f"{str(file)!r}, line {line}: {len(row)} fields, but the header has {wanted}, separated by "
                        f"{layout.separator!r}. Mend the row (a field that holds the separator, a quote or a line "
                        'end stands in quotes, "like, this"), or set data.separator if the file has another one.'
                    )
                yield row
            line = layout.skipped + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{str(file)!r}, line {line}: {error}. A quote at the beginning of a field encloses it up to the next "
            'one; write quotes inside of a field twice (""like this""), or set data.separator if it is not '
            f"{layout.separator!r}."
        ) from error


def _recognise_separator(file: Path, header: str) -> str:
    """Return the usual separator of the file if its header holds it, or else the only other one that it holds."""
    usual = "\t" if ".tsv" in [suffix.lower() for suffix in file.suffixes] else ","
    bare = re.sub(r'"[^"]*"', "", header)
    found = [separator for separator in SEPARATORS if separator in bare]
    if usual in found or not found:
        return usual
    if len(found) > 1:
        raise ValueError(
            f"{str(file)!r}: the header {header.strip()!r} may be separated by {' or '.join(map(repr, found))}. Set "
            "data.separator."
        )
    return found[0]


def _check_separator(file: Path, layout: Layout) -> None:
    """Check that no other separator was missed: a header of one field, or one that holds a tab, gives it away."""
    others = [other for other in SEPARATORS if other != layout.separator]
    suspects = others if len(layout.names) == 1 else ["\t"] if "\t" in others else []
    for suspect in suspects:
        if any(suspect in name for name in layout.names):
            raise ValueError(
                f"{str(file)!r}: separated by {layout.separator!r}, the columns are {list(layout.names)}, "
                f"of which one holds {suspect!r}. Set data.separator, probably to {suspect!r}."
            )


def _make_unique(file: Path, header: list[str], unique: Collection[str]) -> tuple[str, ...]:
    names: list[str] = []
    for place, given in enumerate(header):
        name = given.strip("\ufeff \r\n") or f"Unnamed: {place}"
        if name in names and name in unique:
            raise ValueError(
                f"{str(file)!r} has the column {name!r} twice (columns {names.index(name) + 1} and {place + 1}). "
                "Rename or remove one of them."
            )
        number, free = 0, name
        while free in names or (number and free in header):
            number += 1
            free = f"{name}.{number}"
        names.append(free)
    return tuple(names)


def _find_quoting(file: Path, layout: Layout, encoding: str | None) -> Layout:
    """Return the layout with quotes as what they are in this file.

    Many tab-separated files know no quotes: there, `"Stop" says a sign` is a caption, and a quote that is left open
    must not swallow the rows up to the next one. They are recognised by lines that all have the fields of the header
    without quotes, but not with them.
    """
    if not holds_byte(file, b'"'):
        return layout
    fault, several_lines = None, False
    try:
        with _reading_rows(file, layout, encoding) as rows:
            for row in rows:
                several_lines = several_lines or _has_line_end(row)
    except ValueError as error:
        fault = error
    # In commas, a text of several lines may well have one in each line; the quotes are right as long as they close.
    if fault is None and not (several_lines and layout.separator == "\t"):
        return layout
    bare = replace(layout, quoted=False)
    if len(layout.names) > 1 and _fits(file, bare, encoding):
        logger.warning("%s is read without quoting: its quotes do not enclose fields, and stay in the text.", file)
        return bare
    if fault is not None:
        raise fault
    return layout


def _has_line_end(row: list[str]) -> bool:
    return any("\n" in field or "\r" in field for field in row)


def _fits(file: Path, layout: Layout, encoding: str | None) -> bool:
    try:
        with _reading_rows(file, layout, encoding) as rows:
            return all(True for _ in rows)
    except ValueError:
        return False
