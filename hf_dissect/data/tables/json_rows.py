"""Read rows from JSON: one object a line, a list of objects, or an object of columns.

The "json" builder of `datasets` turns a caption "2009-01-01" into a date, stops at the first number with a decimal
point in a column that began with integers, and stops at text that cannot be encoded.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_dissect.data.surrogates import escape_unencodable
from hf_dissect.data.tables.text_file import read_text, reading_text

_HALF_PAIR = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")  # of two escapes that stand for one character

logger = logging.getLogger(__name__)


def iterate_json_rows(
    file: Path, encoding: str | None, lines: bool, *, warns: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file; text with half a character, which no table can hold, is escaped and marked.

    Args:
        file: File of JSON.
        encoding: See `reading_text`.
        lines: True if each line is a row.
        warns: False in a second pass, and for a file that was loaded before.

    Raises:
        ValueError: If it is not JSON, or holds anything but rows; the message names the file and the line.
    """
    is_known = not warns
    for line, row, may_have_halves in _iterate_lines(file, encoding) if lines else _iterate_whole(file, encoding):
        if not isinstance(row, dict):
            raise ValueError(
                f"{str(file)!r}, {line}: {type(row).__name__} instead of an object such as "
                '{"image": "0.jpg", "caption": "a cat"}.'
            )
        if may_have_halves:
            row, is_known = _escape_halves(f"{file}, {line}", row, is_known)
        yield row


def load_json(file: Path, encoding: str | None, *, warns: bool = True) -> Any:
    """Return the content of a JSON file that is one value; a file of several lines of JSON gives a list.

    Args:
        file: File of JSON.
        encoding: See `reading_text`.
        warns: False for a file that was loaded before.

    Raises:
        ValueError: If it is not JSON; the message names the file and the line.
    """
    text = read_text(file, encoding).lstrip("\ufeff")
    try:
        content = json.loads(text)
        return _escape_halves(str(file), content, not warns)[0] if _HALF_PAIR.search(text) else content
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return list(iterate_json_rows(file, encoding, lines=True, warns=warns))
        raise ValueError(_describe(file, error.lineno, error)) from error


def _iterate_whole(file: Path, encoding: str | None) -> Iterator[tuple[str, Any, bool]]:
    content = load_json(file, encoding, warns=False)  # those who looked for captions of COCO in it were warned
    if isinstance(content, dict):
        content = _rows_of_object(file, content)
    if not isinstance(content, list):
        raise ValueError(f"{str(file)!r} holds {type(content).__name__} instead of a list of objects, one a row.")
    for number, row in enumerate(content):
        yield f"row {number}", row, False


def _rows_of_object(file: Path, content: dict[str, Any]) -> list[Any]:
    """Return the rows of an object: itself, or the list of objects in it, or the columns in it turned into rows."""
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    tables = [name for name, value in lists.items() if value and isinstance(value[0], dict)]
    if len(tables) == 1:
        return content[tables[0]]
    if len(tables) > 1:
        raise ValueError(
            f"{str(file)!r} is an object of several lists of objects ({', '.join(tables)}). A file of captions as of "
            'COCO has "images" and "annotations" with "image_id" and "caption"; otherwise, keep one list.'
        )
    if len(lists) == len(content) > 1 and len({len(value) for value in lists.values()}) == 1:
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return [content]


def _iterate_lines(file: Path, encoding: str | None) -> Iterator[tuple[str, Any, bool]]:
    """Yield place and value of each line, and True if the value may hold half a character."""
    with reading_text(file, encoding) as text:
        for number, line in enumerate(text, start=1):
            bare = line.strip("\ufeff \t\r\n")
            if not bare:
                continue
            try:
                row = json.loads(bare)
            except json.JSONDecodeError as error:
                raise ValueError(_describe(file, number, error)) from error
            yield f"line {number}", row, bool(_HALF_PAIR.search(bare))


def _escape_halves(place: str, value: Any, is_known: bool) -> tuple[Any, bool]:
    """Return a value with texts that cannot be encoded escaped, and whether they were warned of."""
    escaped = escape_unencodable(value)
    if escaped != value and not is_known:
        logger.warning(
            "%s: a text with half a character (a lone surrogate) cannot be encoded. Such a text is escaped, and as a "
            "caption it makes a row that cannot be read.",
            place,
        )
    return escaped, is_known or escaped != value


def _describe(file: Path, line: int, error: json.JSONDecodeError) -> str:
    return (
        f"{file}: not readable as json (line {line}, character {error.colno}: {error.msg}). It may be cut off: "
        "write it again, or remove the line."
    )
