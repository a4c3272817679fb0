"""Columns that lead from the table of an audit back to the user's data: file name, key and id."""

from collections.abc import Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_dissect.data.arrow_columns import read_chunked_column
from hf_dissect.data.pairs import PairDataset

KEY_COLUMNS = ("__key__", "key")
ID_COLUMNS = ("id", "image_id", "uid")
FILE_COLUMNS = ("file_name", "filename", "filepath", "file_path", "image_path", "url")


def read_source_columns(rows: datasets.Dataset, pairs: PairDataset) -> dict[str, pa.Array]:
    """Read what identifies the pairs in the user's data.

    Args:
        rows: Data set with all its columns, its pictures undecoded.
        pairs: Pairs of `rows`.

    Returns:
        Columns of one value a pair, those that exist: `file_name`, the path of the image or a column of such names;
        `key`, that of a sample in a tar; `id`, the value of the id column, or of a column of a usual name.
    """
    named = pairs.columns.sample_id
    found = {
        "file_name": _read_image_paths(rows, pairs.columns.image) or _read_first(rows, FILE_COLUMNS),
        "key": _read_first(rows, KEY_COLUMNS),
        "id": _read_first(rows, ID_COLUMNS if named is None else (named,)),
    }
    row = pa.array(pairs.row_of_pair)
    return {name: values.take(row) for name, values in found.items() if values is not None}


def _read_first(rows: datasets.Dataset, names: Sequence[str]) -> pa.Array | None:
    for name in names:
        if name in rows.column_names:
            values = read_chunked_column(rows, name)
            if pa.types.is_integer(values.type) or _is_text(values.type):
                return _join(values)
    return None


def _read_image_paths(rows: datasets.Dataset, column: str) -> pa.Array | None:
    """Return the paths of the pictures; None where no picture has one."""
    kind = rows.features.get(column)
    if isinstance(kind, datasets.Image):
        table = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        # Part by part, because the bytes of all pictures may not fit into the memory.
        parts = [_join(pc.struct_field(part[column], "path")) for part in table.iter(1000)]
        paths = pa.concat_arrays(parts)
    elif column in rows.column_names and _is_text(read_chunked_column(rows, column).type):
        paths = _join(read_chunked_column(rows, column))
    else:
        return None
    return None if paths.null_count == len(paths) else paths


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _join(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return values.cast(pa.large_string()) if _is_text(values.type) else values
