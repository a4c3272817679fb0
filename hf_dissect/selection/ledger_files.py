"""Scores of pairs as Parquet files, written from the ledger of a run and read from any folder or file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_dissect.selection.saved_ledger import LEDGER_FILE, SavedLedger, has_ledger, read_ledger

ID_COLUMN = "sample_id"
PAIRS_PER_FILE = 5_000_000
_PAIRS_PER_GROUP = 250_000
_HEADER = b"hf_dissect.ledger"


def write_tables(ledger: SavedLedger, folder: Path) -> list[Path]:
    """Write a ledger as files `train-*.parquet`, in the order of the ids and without pairs that have no score.

    The files have a column `sample_id` int64 and the columns of the ledger, float32, null for a missing score.

    Args:
        ledger: Ledger to write.
        folder: Folder to write to, created if it does not exist.

    Returns:
        Paths of the files.
    """
    (places,) = find_scored(ledger).nonzero(as_tuple=True)
    places = places[ledger.ids[places].argsort()]
    names = sorted(ledger.columns)
    header = {"num_samples": ledger.num_samples, "columns": names}
    schema = pa.schema(
        [(ID_COLUMN, pa.int64()), *((name, pa.float32()) for name in names)], metadata={_HEADER: json.dumps(header)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = places.split(PAIRS_PER_FILE)
    files = [folder / f"train-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        with pq.ParquetWriter(file, schema) as writer:
            for group in part.split(_PAIRS_PER_GROUP):
                values = {name: ledger.columns[name][group].numpy() for name in names}
                columns = [pa.array(values[name], mask=np.isnan(values[name])) for name in names]
                writer.write_table(pa.table([pa.array(ledger.ids[group].numpy()), *columns], schema=schema))
    return files


def find_scored(ledger: SavedLedger) -> torch.Tensor:
    """Return a mask of the pairs with a score in any column, bool `(n,)`."""
    return torch.stack([~values.isnan() for values in ledger.columns.values()]).any(0)


def read_scores(path: str | os.PathLike, name: str | None = None) -> SavedLedger:
    """Read scores of pairs from a run folder, a checkpoint, a ledger file, or a folder or file of Parquet.

    Args:
        path: Folder or file.
        name: Name of the scores in errors; None for `path`.

    Raises:
        FileNotFoundError: There are no scores.
        ValueError: The files are damaged or hold something else, or ids are repeated.
    """
    name, path = str(path) if name is None else name, Path(path).expanduser()
    if path.suffix == ".safetensors" or has_ledger(path):
        return read_ledger(path)
    files = [path] if path.suffix == ".parquet" else sorted(_parquet_files(path))
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"selection.ledger {name!r}: found neither {LEDGER_FILE} nor a Parquet file of scores; name the folder "
            "of a run, or a data set that hf-dissect push-ledger published (hub:USER/REPO)."
        )
    return _read_tables(name, files)


def _parquet_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.parquet")
    yield from folder.glob("data/*.parquet")


def _read_tables(name: str, files: list[Path]) -> SavedLedger:
    try:
        tables = [pq.read_table(file) for file in files]
        header = json.loads((tables[0].schema.metadata or {})[_HEADER])
        table = pa.concat_tables(tables).combine_chunks()
        ids = torch.from_numpy(table[ID_COLUMN].to_numpy().astype(np.int64))
        columns = {column: _floats(table[column]) for column in header["columns"]}
        num_samples = header["num_samples"]
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"selection.ledger {name!r}: {files[0].name} holds no scores as hf-dissect push-ledger writes them "
            f"({type(error).__name__}: {error})."
        ) from error
    in_range = len(ids) == 0 or (ids.min() >= 0 and (num_samples is None or ids.max() < num_samples))
    if len(ids.unique()) < len(ids) or not in_range:
        raise ValueError(f"selection.ledger {name!r}: its ids are repeated, negative or too large.")
    return SavedLedger(num_samples, ids, columns, {})


def _floats(column: pa.ChunkedArray) -> torch.Tensor:
    return torch.from_numpy(column.cast(pa.float32()).to_numpy(zero_copy_only=False).astype(np.float32))
