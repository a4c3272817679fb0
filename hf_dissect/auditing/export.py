"""Export of a data set without its suspicious pairs, as Parquet shards with the columns it had."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from hf_dissect.data.pair_columns import is_list
from hf_dissect.data.pairs import PairDataset

ROWS_AT_ONCE = 500
SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class CleanExport:
    """Result of an export.

    Attributes:
        folder: Folder of the shards.
        pairs_before, pairs_after: Numbers of pairs in the data set and in the export.
        rows_before, rows_after: Numbers of rows in the data set and in the export.
    """

    folder: Path
    pairs_before: int
    pairs_after: int
    rows_before: int
    rows_after: int


def check_folder(folder: Path) -> None:
    """Check, before any work, that an export overwrites nothing.

    Raises:
        ValueError: The folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export-clean {folder} is not empty; name a new folder, or remove this one.")


def export_clean(
    folder: Path, rows: datasets.Dataset, pairs: PairDataset, keep: np.ndarray, *, split: str = "train"
) -> CleanExport:
    """Write the rows that keep a caption as `<split>-<i>-of-<n>.parquet`.

    Pictures are copied unchanged, also those in files of their own. A row with several captions keeps those of the
    kept pairs and their truths; a row without any is dropped.

    Args:
        folder: New or empty folder; written under a temporary name first.
        rows: Data set, its pictures undecoded.
        pairs: Pairs of `rows`.
        keep: Mask of the pairs to keep, bool `(len(pairs),)`.
        split: Name of the split, for the files.

    Raises:
        ValueError: The folder is not empty, or no pair is kept.
    """
    check_folder(folder)
    if not keep.any():
        raise ValueError("--export-clean would keep no pair; raise --keep or --threshold.")
    kept_row = np.zeros(len(rows), bool)
    kept_row[pairs.row_of_pair[keep]] = True
    features = _with_pictures(rows.features)
    parallel = [name for name in (pairs.columns.caption, pairs.columns.clean) if name and _holds_lists(rows, name)]
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shards = _Shards(temporary, features.arrow_schema)
        numbers = np.flatnonzero(kept_row)
        first_pair = np.searchsorted(pairs.row_of_pair, np.arange(len(rows) + 1))
        table = rows.with_format("arrow")
        for part in tqdm(range(0, len(numbers), ROWS_AT_ONCE), desc="clean data", unit="batch"):
            chosen = numbers[part : part + ROWS_AT_ONCE]
            kept = [keep[first_pair[row] : first_pair[row + 1]] for row in chosen]
            batch = table[chosen.tolist()]
            for name in parallel:
                batch = _replace(batch, name, partial(_filtered, kept=kept))
            shards.write(embed_table_storage(batch.cast(shards.schema)))
        shards.close(split)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return CleanExport(folder, len(pairs), int(keep.sum()), len(rows), len(numbers))


class _Shards:
    """Parquet files of one schema: a new one when the last is large, all named when their number is known."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._folder = folder
        self._files: list[Path] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows to the last file, or to a new one."""
        if self._writer is None:
            self._files.append(self._folder / f"{len(self._files)}.parquet")
            self._writer = pq.ParquetWriter(self._files[-1], self.schema)
        self._writer.write_table(table)
        if self._files[-1].stat().st_size >= SHARD_BYTES:
            self._finish()

    def close(self, split: str) -> None:
        """Finish the last file and name all of them."""
        self._finish()
        for number, file in enumerate(self._files):
            file.rename(self._folder / f"{split}-{number:05}-of-{len(self._files):05}.parquet")

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _with_pictures(features: datasets.Features) -> datasets.Features:
    """Return the columns with decoding switched on again, for those who load the export."""
    return datasets.Features(
        {name: datasets.Image() if isinstance(kind, datasets.Image) else kind for name, kind in features.items()}
    )


def _holds_lists(rows: datasets.Dataset, name: str) -> bool:
    return is_list(rows.data.schema.field(name).type)


def _replace(table: pa.Table, name: str, change: Callable[[pa.Array], pa.Array]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, change(table[name].combine_chunks()))


def _filtered(values: pa.Array, kept: list[np.ndarray]) -> pa.Array:
    """Return lists without the values that are not kept."""
    flat = pc.list_flatten(values).filter(pa.array(np.concatenate(kept)))
    offsets = np.concatenate([[0], np.cumsum([places.sum() for places in kept])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
