"""Find the types of columns from all of their values, so that neither the first rows nor a file decides for the rest.

What people read stays text: a caption "NA", a task "1e5" and an id "007" are no missing value and no numbers.
"""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Json, List, Value
from datasets.features.features import generate_from_arrow_type

MISSING = ("NA", "N/A", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none", "<NA>", "#N/A")
"""Text that stands for a missing number, in columns that hold numbers otherwise."""

_INTEGER = r"^-?(0|[1-9][0-9]{0,18})$"
_NUMBER = r"^[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[iI]nf(inity)?)$"
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class TextColumnType:
    """Type of a column of a text file that knows no types.

    Args:
        kind: "text" for a column that is text in any case, "names" for one of text or integers, "any" for others.
    """

    def __init__(self, kind: str = "any") -> None:
        self._kind = kind
        self._possible = {"text": [], "names": ["int64"], "any": ["int64", "float64", "bool"]}[kind]
        self._seen = False

    def add(self, column: pa.ChunkedArray) -> None:
        """Take note of the strings of a part of the column."""
        if not self._possible:
            return
        present = self._leave_out_missing(pc.unique(column)).drop_null()
        if len(present):
            self._seen = True
            self._possible = [name for name in self._possible if _fits(present, name)]

    @property
    def feature(self) -> Value:
        """The narrowest type that holds all values, as a feature of a data set."""
        return Value(self._possible[0] if self._seen and self._possible else "string")

    def convert(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return the strings of a part of the column in its type."""
        kind = self.feature.pa_type
        if pa.types.is_string(kind):
            return column
        present = self._leave_out_missing(column)
        if pa.types.is_boolean(kind):
            truths = [pa.array([_TRUTHS.get(value) for value in chunk.to_pylist()], kind) for chunk in present.chunks]
            return pa.chunked_array(truths, kind)
        return present.cast(kind)

    def _leave_out_missing(self, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Return the column with None where a number would be missing."""
        if self._kind != "any":
            return column
        trimmed = pc.utf8_trim_whitespace(column)
        return pc.if_else(pc.is_in(trimmed, pa.array(["", *MISSING])), None, trimmed)


def _fits(column: pa.Array, name: str) -> bool:
    if name == "bool":
        return bool(pc.all(pc.is_in(column, pa.array(list(_TRUTHS)))).as_py())
    pattern = _INTEGER if name == "int64" else _NUMBER
    if not pc.all(pc.match_substring_regex(column, pattern)).as_py():
        return False
    try:
        column.cast(Value(name).pa_type)
    except pa.ArrowInvalid:  # larger than the type
        return False
    return True


class JsonColumnType:
    """Type of a column of JSON, whose values have types that may be mixed.

    Args:
        kind: As in `TextColumnType`.
    """

    def __init__(self, kind: str = "any") -> None:
        self._kind = kind
        self._type: pa.DataType = pa.null()
        self._mixed = self._has_lists = False

    def add(self, values: list[Any]) -> None:
        """Take note of some values of the column."""
        self._has_lists = self._has_lists or (self._kind == "text" and any(isinstance(each, list) for each in values))
        if self._mixed:
            return
        try:
            own = [pa.schema([("", kind)]) for kind in (self._type, pa.array(values).type)]
            self._type = pa.unify_schemas(own, promote_options="permissive").field(0).type
        except (pa.ArrowException, OverflowError):
            self._mixed = True

    @property
    def feature(self) -> Any:
        """The narrowest type that holds all values, as a feature of a data set."""
        if self._mixed and self._kind == "text" and self._has_lists:
            return List(Value("string"))
        if self._mixed:
            return Json() if self._kind == "any" else Value("string")
        if pa.types.is_null(self._type):
            return Value("string")
        return generate_from_arrow_type(self._type)

    def convert(self, values: list[Any]) -> pa.Array:
        """Return values of the column in its type."""
        if not self._mixed:
            return pa.array(values, pa.string() if pa.types.is_null(self._type) else self._type)
        if self._kind == "any":
            return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
        if self._kind == "text" and self._has_lists:
            lists = [value if isinstance(value, list) else [value] for value in values]
            return pa.array([[_as_text(value) for value in each] for each in lists], pa.list_(pa.string()))
        return pa.array([_as_text(value) for value in values], pa.string())


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
