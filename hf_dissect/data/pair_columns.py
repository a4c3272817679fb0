"""Recognise the columns of an (image, caption) pair and check their values before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from hf_dissect.data.arrow_columns import is_list, list_lengths, read_chunked_column

IMAGE_COLUMNS = ("image", "image_features", "jpg", "img", "image_path", "filepath", "file_name")
CAPTION_COLUMNS = ("caption", "text", "captions")
OPEN_CLIP_COLUMNS = ("filepath", "title")
"""Columns of the image and the caption in the tables of open_clip; alone, a title may be anything."""
CLEAN_COLUMNS = ("clean", "is_clean")
TEXT_FEATURES_COLUMN = "text_features"
LARGEST_ID = 2**63 - 1
NO_ROWS = "The data set has no rows; check the path, the split and any filter."


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns a pair is made of; None where the table has no such column."""

    image: str
    caption: str
    sample_id: str | None = None
    task: str | None = None
    clean: str | None = None
    text_features: str | None = None
    weight: str | None = None
    balance: str | None = None

    @classmethod
    def recognise(
        cls,
        available: Sequence[str],
        *,
        image: str | None = None,
        caption: str | None = None,
        sample_id: str | None = None,
        task: str | None = None,
        clean: str | None = None,
        weight: str | None = None,
        balance: str | None = None,
    ) -> "PairColumns":
        """Take the given names, or else the usual ones.

        Args:
            available: Columns of the table.
            image: Column with the images; None recognises the usual names.
            caption: Column with the captions; None recognises the usual names.
            sample_id: Column with the ids; None if there is none.
            task: Column with the tasks; None if there is none.
            clean: Column with the truth; None recognises the usual names, or none.
            weight: Column with the weights; None if there is none.
            balance: Column with the clusters to balance; None if there is none.

        Raises:
            ValueError: If a named column is missing, or there is no usual one; the message lists the columns.
        """
        given = {
            "image_column": image,
            "caption_column": caption,
            "id_column": sample_id,
            "task_column": task,
            "clean_column": clean,
            "weight_column": weight,
            "balance_column": balance,
        }
        for argument, name in given.items():
            if name is not None and name not in available:
                raise ValueError(f"{argument}={name!r}: no such column; the data has {', '.join(available)}.")
        return cls(
            image=image or _find_usual_name(IMAGE_COLUMNS, available, "image_column"),
            caption=caption
            or find_usual_caption_column(available)
            or _find_usual_name(CAPTION_COLUMNS, available, "caption_column"),
            sample_id=sample_id,
            task=task,
            clean=clean or next((name for name in CLEAN_COLUMNS if name in available), None),
            text_features=TEXT_FEATURES_COLUMN if TEXT_FEATURES_COLUMN in available else None,
            weight=weight,
            balance=balance,
        )

    @property
    def names(self) -> list[str]:
        """The columns in use, each once."""
        of_pair = (self.image, self.caption, self.sample_id, self.task, self.clean, self.text_features)
        names = (*of_pair, self.weight, self.balance)
        return list(dict.fromkeys(name for name in names if name))


def find_usual_caption_column(available: Sequence[str]) -> str | None:
    """Return the column with a usual name of captions, or None."""
    usual = next((name for name in CAPTION_COLUMNS if name in available), None)
    return usual or (OPEN_CLIP_COLUMNS[1] if set(OPEN_CLIP_COLUMNS) <= set(available) else None)


def _find_usual_name(names: Sequence[str], available: Sequence[str], argument: str) -> str:
    for name in names:
        if name in available:
            return name
    raise ValueError(
        f"No column named {' or '.join(names)}; the data has {', '.join(available) or 'no columns'}. "
        f"Name yours with {argument}=..."
    )


def find_truth_column(rows: datasets.Dataset | datasets.IterableDataset, named: str | None = None) -> str | None:
    """Return the column with the truth: the named one, or the first usual one that holds true and false, or 0 and 1.

    A column of another kind, such as captions that somebody has cleaned, means something else by its name.
    """
    if named is not None:
        return named
    return next(
        (name for name in CLEAN_COLUMNS if name in (rows.column_names or ()) and _may_be_truth(rows, name)), None
    )


def _may_be_truth(rows: datasets.Dataset | datasets.IterableDataset, name: str) -> bool:
    if rows.features is None:  # a stream that does not know its columns
        return True
    kind = rows.features.arrow_schema.field(name).type
    kind = kind.value_type if is_list(kind) else kind
    if pa.types.is_integer(kind) and isinstance(rows, datasets.Dataset):
        values = read_chunked_column(rows, name)
        ends = pc.min_max(pc.list_flatten(values) if is_list(values.type) else values)
        return (ends["min"].as_py() or 0) >= 0 and (ends["max"].as_py() or 0) <= 1
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind)


def key_hash(value: bytes | str) -> int:
    """Return the hash of a key, a caption or an image, of 63 bits so that it is a non-negative int64."""
    # Half of a surrogate pair, which JSON can hold, is not UTF-8 but has a hash.
    content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return xxhash.xxh3_64_intdigest(content) >> 1


def select_undecoded(rows: Any, columns: PairColumns) -> Any:
    """Return a table or stream with the columns of a pair only, without its format, and the image as stored."""
    rows = rows.with_format(None)
    names, available = columns.names, rows.column_names
    if available is not None:  # a transform may make columns that the table lacks, which must keep its rows
        names = [name for name in names if name in available] or available[:1]
    rows = rows.select_columns(names)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def make_pair_ids(name: str, values: pa.ChunkedArray, row: np.ndarray, place: np.ndarray | None) -> np.ndarray:
    """Make the ids of pairs from an id column.

    Args:
        name: Name of the column.
        values: Values of the column, one a row.
        row: Row of each pair, int `(pairs,)`.
        place: Place of each pair's caption among those of its row, int `(pairs,)`; None where a row has one caption.

    Returns:
        int64 `(pairs,)`: integers unchanged and strings hashed; with several captions a row,
        `id * most captions + place` or the hash of `"id#place"`.

    Raises:
        ValueError: If ids are missing, negative, too large, repeated, or neither integers nor strings.
    """
    if values.null_count:
        raise ValueError(f"id_column={name!r}: {values.null_count} rows have no id; every row needs its own.")
    if pa.types.is_integer(values.type):
        ids = _make_integer_ids(name, values, row, place)
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        keys = values.to_pylist()
        suffix = [""] * len(row) if place is None else [f"#{position}" for position in place.tolist()]
        hashes = (key_hash(keys[index] + end) for index, end in zip(row.tolist(), suffix, strict=True))
        ids = np.fromiter(hashes, dtype=np.int64, count=len(row))
    else:
        raise ValueError(f"id_column={name!r} holds {values.type}; ids are integers or strings.")
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(unique) < len(ids):
        repeated = counts > 1
        example = values[int(row[first[repeated][0]])].as_py()
        raise ValueError(
            f"id_column={name!r}: {repeated.sum()} ids are not unique, first {example!r}; give each row an id of its "
            "own, or leave id_column out to number the rows."
        )
    return ids


def _make_integer_ids(name: str, values: pa.ChunkedArray, row: np.ndarray, place: np.ndarray | None) -> np.ndarray:
    lowest, highest = (pc.min_max(values)[end].as_py() for end in ("min", "max"))
    if lowest < 0:
        raise ValueError(f"id_column={name!r}: id {lowest} is negative; ids are integers from 0 upwards.")
    most = 1 if place is None else int(place.max()) + 1
    if (highest + 1) * most - 1 > LARGEST_ID:
        raise ValueError(
            f"id_column={name!r}: id {highest} is too large; with {most} captions a row, ids go up to "
            f"{(LARGEST_ID + 1) // most - 1}. Store them as strings, which are hashed."
        )
    ids = values.to_numpy().astype(np.int64)[row]
    return ids if place is None else ids * most + place


def read_task_numbers(name: str, values: pa.ChunkedArray) -> tuple[np.ndarray, list[str] | None]:
    """Return the tasks of the rows as numbers: integers unchanged, names by their alphabetical rank.

    Returns:
        int64 `(rows,)`, and the names by number, None where the tasks are integers.

    Raises:
        ValueError: If rows have no task, or tasks are neither integers nor names.
    """
    if values.null_count:
        raise ValueError(f"task_column={name!r}: {values.null_count} rows have no task; name one each.")
    if pa.types.is_integer(values.type):
        return values.to_numpy().astype(np.int64), None
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(f"task_column={name!r} holds {values.type}; tasks are integers or names.")
    names, numbers = np.unique(values.to_numpy(), return_inverse=True)
    return numbers.astype(np.int64), names.tolist()


def check_truth(name: str, truth: pa.ChunkedArray, captions: pa.ChunkedArray) -> None:
    """Check that every pair has a truth, true or false.

    Args:
        name: Name of the column.
        truth: Values of the column, one a row, or lists parallel to the captions.
        captions: Captions of the rows.

    Raises:
        ValueError: If truths are of another type, missing, or not parallel to the captions.
    """
    way_out = "Mend the column, or rename it if it means something else."
    if is_list(truth.type):
        if not is_list(captions.type):
            raise ValueError(f"clean_column={name!r} holds lists, but a row has one caption. {way_out}")
        wanted, given = list_lengths(captions), list_lengths(truth)
        # A row without captions is one bad pair, with any truth.
        wrong = np.flatnonzero((wanted != given) & (wanted > 0))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"clean_column={name!r}: row {row} has {given[row]} values for {wanted[row]} captions. {way_out}"
            )
        truth = pc.list_flatten(truth)
    if not (pa.types.is_boolean(truth.type) or pa.types.is_integer(truth.type)):
        raise ValueError(f"clean_column={name!r} holds {truth.type}, not true or false. {way_out}")
    if truth.null_count:
        raise ValueError(f"clean_column={name!r}: the truth of {truth.null_count} pairs is missing. {way_out}")
