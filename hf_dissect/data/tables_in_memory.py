"""Make tables of rows that people hold in memory: lists of dicts, pandas and polars data frames, Arrow tables."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from hf_dissect.data.encoded_pictures import as_numpy, begins_like_picture, find_encoded
from hf_dissect.data.images import UnusableImage, decode_image, is_feature_vector
from hf_dissect.data.pair_columns import NO_ROWS
from hf_dissect.data.surrogates import escape_unencodable


def make_table(data: Any) -> datasets.Dataset | None:
    """Make a table of rows in memory.

    Args:
        data: List or tuple of dicts, data frame of pandas or polars, or `pa.Table`.

    Returns:
        The table, in which texts that cannot be encoded are escaped; None for data of other kinds.

    Raises:
        ValueError: There are no rows, or they do not make a table.
    """
    if isinstance(data, list | tuple):
        return _from_rows(data)
    if isinstance(data, pa.Table):
        return _from_arrow(data)
    library = type(data).__module__.split(".")[0]
    if library == "pandas" and hasattr(data, "columns"):
        return _from_pandas(data)
    if library == "polars":
        if not hasattr(data, "to_arrow"):
            raise ValueError(f"{type(data).__name__} of polars has no rows yet; pass its .collect().")
        return _from_arrow(data.to_arrow())
    return None


def _from_rows(rows: Sequence[Any]) -> datasets.Dataset:
    if not rows:
        raise ValueError(NO_ROWS)
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {position} is {type(row).__name__}; pass a list of dicts with image and caption.")
    names = dict.fromkeys(name for row in rows for name in row)
    return _from_columns({name: [row.get(name) for row in rows] for name in names}, "list of dicts")


def _from_pandas(frame: Any) -> datasets.Dataset:
    if len(frame) == 0:
        raise ValueError(NO_ROWS)
    if frame.columns.nlevels > 1 or not frame.columns.is_unique:
        raise ValueError(
            f"The columns of the DataFrame ({', '.join(map(str, frame.columns))}) need one name each, all different."
        )
    frame = frame.rename(columns=str)
    types = {name: kind.categories.dtype for name, kind in frame.dtypes.items() if hasattr(kind, "categories")}
    frame = frame.astype(types)
    try:
        return _from_arrow(pa.Table.from_pandas(frame, preserve_index=False))
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
        # Pictures and texts in columns of objects, which Arrow does not know or which cannot be encoded.
        return _from_columns({name: frame[name].tolist() for name in frame.columns}, "DataFrame")


def _from_arrow(table: pa.Table) -> datasets.Dataset:
    if table.num_rows == 0:
        raise ValueError(NO_ROWS)
    fields = [field.with_type(_plain_type(field.type)) for field in table.schema]
    return datasets.Dataset(table.cast(pa.schema(fields)))  # without metadata of pandas


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that `datasets` reads, of a type that only Arrow has: dictionaries and views."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    return kind


def _from_columns(columns: Mapping[str, list[Any]], what: str) -> datasets.Dataset:
    arrays: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for name, values in columns.items():
        values = [os.fspath(value) if isinstance(value, os.PathLike) else value for value in _blank_missing(values)]
        if _holds_pictures(values):
            arrays[name] = [_encode_picture(value) for value in values]
            features[name] = datasets.Image(decode=False)
        else:
            arrays[name] = _escape(values)
    try:
        table = datasets.Dataset.from_dict(arrays)
        for name, feature in features.items():
            table = table.cast_column(name, feature)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The {what} does not make a table ({error}); a column holds values of one type, captions strings."
        ) from error
    return table


def _blank_missing(values: list[Any]) -> list[Any]:
    """Return None for NaN among values that are not numbers, as pandas marks what is missing."""
    if all(isinstance(value, int | float | None) for value in values):
        return values
    return [None if isinstance(value, float) and value != value else value for value in values]


def _holds_pictures(values: list[Any]) -> bool:
    """Return whether a column holds pictures in a form, or in several forms, that Arrow does not know."""
    kinds = {next((kind for kind in (str, bytes, Mapping) if isinstance(value, kind)), None) for value in values}
    mixed = len(kinds - {None}) > 1 and any(_is_picture_row(value) for value in values)
    return mixed or any(map(_needs_encoding, values))


def _is_picture_row(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and set(value) <= {"bytes", "path"}
    return isinstance(value, bytes) and begins_like_picture(np.frombuffer(value, np.uint8))


def _needs_encoding(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_picture_row(value) and not isinstance(value.get("bytes"), bytes | str | None)
    if value is None or isinstance(value, str | bytes | int | float):
        return isinstance(value, np.bytes_)
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, list | tuple) and (not value or isinstance(value[0], str | float | None)):
        return False
    if is_feature_vector(value):
        return False
    return find_encoded(value) is not None or getattr(as_numpy(value), "ndim", 0) > 1


def _encode_picture(value: Any) -> dict[str, Any] | None:
    """Return the value of a column of `datasets.Image` with the bytes of a picture, or its path."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        content = value.get("bytes")
        return {"bytes": None if content is None else find_encoded(content), "path": value.get("path")}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if isinstance(value, Image.Image):
        # The file of a picture that is not loaded yet has its pixels.
        file = getattr(value, "filename", "")
        if file and getattr(value, "_im", None) is None:
            return {"bytes": None, "path": os.fspath(file)}
    elif (content := find_encoded(value)) is not None:
        return {"bytes": content, "path": None}
    buffer = io.BytesIO()
    try:
        decode_image(value).save(buffer, format="PNG")
    except UnusableImage as error:
        return {"bytes": str(error).encode(), "path": None}  # which is not a picture, and says why
    return {"bytes": buffer.getvalue(), "path": None}


def _escape(values: list[Any]) -> list[Any]:
    """Return the values, with texts that cannot be encoded escaped and marked."""
    return [escape_unencodable(value) if isinstance(value, str | list | tuple | dict) else value for value in values]
