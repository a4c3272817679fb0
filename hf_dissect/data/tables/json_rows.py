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

from hf_dissect.data.tables.text_file import read_text, reading_text

_HALF_PAIR = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")  # of two escapes that stand for one character

logger = logging.getLogger(__name__)


def iterate_json_rows(file: Path, encoding: str | None, lines: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file; text with half a character, which no file can hold, is None.

    Args:
        file: File of JSON.
        encoding: See `reading_text`.
        lines: True if each line is a row.

    Raises:
        ValueError: If it is not JSON, or holds anything but rows; the message names the file and the line.
    """
    removed = 0
    for line, row, escaped in _iterate_lines(file, encoding) if lines else _iterate_whole(file, encoding):
        if not isinstance(row, dict):
            raise ValueError(
                f"{str(file)!r}, {line}: {type(row).__name__} instead of an object such as "
                '{"image": "0.jpg", "caption": "a cat"}.'
            )
        if escaped:
            row, count = _remove_halves(row)
            removed += count
        yield row
    _report(file, removed)


def load_json(file: Path, encoding: str | None) -> Any:
    """Return the content of a JSON file that is one value; a file of several lines of JSON gives a list.

    Raises:
        ValueError: If it is not JSON; the message names the file and the line.
    """
    text = read_text(file, encoding).lstrip("\ufeff")
    try:
        content, removed = json.loads(text), 0
        if _HALF_PAIR.search(text):
            content, removed = _remove_halves(content)
        _report(file, removed)
        return content
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return list(iterate_json_rows(file, encoding, lines=True))
        raise ValueError(_describe(file, error.lineno, error)) from error


def _iterate_whole(file: Path, encoding: str | None) -> Iterator[tuple[str, Any, bool]]:
    content = load_json(file, encoding)
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


def _report(file: Path, removed: int) -> None:
    if removed:
        logger.warning("%s: %d texts with half a character (a lone surrogate) are left out.", file, removed)


def _describe(file: Path, line: int, error: json.JSONDecodeError) -> str:
    return (
        f"{file}: not readable as json (line {line}, character {error.colno}: {error.msg}). It may be cut off: "
        "write it again, or remove the line."
    )


def _remove_halves(value: Any) -> tuple[Any, int]:
    """Return a value without texts that cannot be encoded, and their number."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None, 1
        return value, 0
    if isinstance(value, dict):
        parts = {key: _remove_halves(each) for key, each in value.items()}
        return {key: each for key, (each, _) in parts.items()}, sum(count for _, count in parts.values())
    if isinstance(value, list):
        items = [_remove_halves(each) for each in value]
        return [each for each, _ in items], sum(count for _, count in items)
    return value, 0
