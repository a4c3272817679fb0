"""Ledgers on the disk: one file, or a shard of each process, which are read as one ledger."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LEDGER_FILE = "ledger.safetensors"
"""Name of the ledger in a run folder and in its checkpoints."""

_FORMAT = "hf_dissect.ledger/1"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class SavedLedger:
    """The content of a ledger file, or of all shards of a ledger.

    Attributes:
        num_samples: Number of pairs if ids are row numbers, None for arbitrary ids.
        ids: Ids of the pairs, int64 `(n,)`.
        columns: Values float32 `(n,)` of each column, NaN for a pair that was never written.
        metadata: Metadata that was saved with the ledger.
    """

    num_samples: int | None
    ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    metadata: dict[str, object]

    def subset(self, places: torch.Tensor) -> "SavedLedger":
        """Return the ledger of some pairs, given by their places int64 `(m,)` or by a mask bool `(n,)`."""
        columns = {name: values[places] for name, values in self.columns.items()}
        return SavedLedger(self.num_samples, self.ids[places], columns, self.metadata)


def write_ledger(path: Path, saved: SavedLedger, shard: tuple[int, int] | None = None) -> None:
    """Write a ledger under a temporary name first, so that its file is whole or absent, and remove what it replaces.

    Args:
        path: File of the whole ledger.
        saved: Content to write.
        shard: Number of this shard and number of shards; None for a whole ledger.
    """
    tensors = {f"column.{name}": values.contiguous() for name, values in saved.columns.items()}
    if saved.num_samples is None:
        tensors["ids"] = saved.ids
    header = {"format": _FORMAT, "metadata": json.dumps(saved.metadata), "num_samples": json.dumps(saved.num_samples)}
    target = path
    if shard is not None:
        target = name_shard(path, *shard)
        header["shard"] = json.dumps(shard)
    temporary = target.with_name(target.name + ".tmp")
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, target)
    if shard is None or shard[0] == 0:
        replaced = [] if shard is None else [path]
        others = [file for file in _find_shards(path) if shard is None or _number(file)[1] != shard[1]]
        for file in (*replaced, *others):
            file.unlink(missing_ok=True)


def name_shard(path: Path, number: int, count: int) -> Path:
    """Return the file of a shard of the ledger at `path`, such as `ledger-00000-of-00002.safetensors`."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def has_ledger(folder: str | os.PathLike[str]) -> bool:
    """Return True if a run folder or checkpoint has a ledger, or a shard of one."""
    path = Path(folder) / LEDGER_FILE
    return path.is_file() or bool(_find_shards(path))


def list_shards(path: Path) -> list[Path]:
    """Return the shards of the ledger at `path`, in the order of their numbers; empty without shards.

    Raises:
        ValueError: Shards are missing, or are those of several numbers of processes.
    """
    files = _find_shards(path)
    if not files:
        return []
    counts = sorted({_number(file)[1] for file in files})
    if len(counts) > 1:
        raise ValueError(
            f"{path.parent} has shards of ledgers of {' and of '.join(map(str, counts))} processes; remove those that "
            "do not belong to it."
        )
    wanted = [name_shard(path, number, counts[0]) for number in range(counts[0])]
    if missing := [file.name for file in wanted if not file.is_file()]:
        raise ValueError(
            f"{path.parent} lacks {', '.join(missing[:3])}, part of its ledger of {counts[0]} shards, of which each "
            "process of a run writes one. Copy all of them there; on nodes without a common disk, each has its own."
        )
    return wanted


def read_ledger(path: str | os.PathLike[str]) -> SavedLedger:
    """Read a file that `SampleLedger.save` wrote, or the shards that all processes of a run wrote in its place.

    Args:
        path: File of the ledger, whole or one shard, or the folder that it is in.

    Returns:
        Content; of shards, all pairs in the order of their ids.

    Raises:
        FileNotFoundError: There is no ledger.
        ValueError: The file is not a ledger, is damaged, or a shard is missing.
    """
    path = Path(path)
    path = path / LEDGER_FILE if path.is_dir() else path
    if not path.is_file() and (files := list_shards(path)):
        return join_shards([read_ledger_file(file) for file in files], path)
    return read_ledger_file(path)


def read_ledger_file(path: Path) -> SavedLedger:
    """Read one file, whole or a shard; see `read_ledger`."""
    if not path.is_file():
        raise FileNotFoundError(f"No ledger at {path}.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a sample ledger (format {header.get('format')!r}, expected {_FORMAT!r}).")
    shard = json.loads(header.get("shard", "null"))
    if shard is not None and tuple(shard) != _number(path):
        raise ValueError(f"{path} was written as shard {shard[0]} of {shard[1]}; give it back its name.")
    num_samples = json.loads(header["num_samples"])
    ids = tensors.pop("ids") if num_samples is None else torch.arange(num_samples)
    columns = {name.removeprefix("column."): values for name, values in tensors.items()}
    return SavedLedger(num_samples, ids, columns, json.loads(header["metadata"]))


def join_shards(shards: Sequence[SavedLedger], path: Path) -> SavedLedger:
    """Join the shards of a ledger, in the order of the ids.

    Raises:
        ValueError: An id is in two shards, or the shards have different columns.
    """
    ids = torch.cat([shard.ids for shard in shards])
    names = list(shards[0].columns)
    if any(set(shard.columns) != set(names) for shard in shards):
        raise ValueError(f"The shards of {path} have different columns: they are not of one checkpoint.")
    columns = {name: torch.cat([shard.columns[name] for shard in shards]) for name in names}
    order = ids.argsort()
    joined = SavedLedger(None, ids, columns, shards[0].metadata).subset(order)
    if (joined.ids[1:] == joined.ids[:-1]).any():
        raise ValueError(f"The shards of {path} share ids: they are not of one checkpoint.")
    return joined


def describe_ids(num_samples: int | None) -> str:
    """Describe the kind of ids of a ledger for an error."""
    return "arbitrary ids" if num_samples is None else f"{num_samples} pairs"


def check_same_ids(path: Path, saved: SavedLedger, num_samples: int | None) -> None:
    """Check that a saved ledger is of the same data as that of a run.

    Raises:
        ValueError: It is of another number of pairs, or another kind of ids.
    """
    if saved.num_samples != num_samples:
        raise ValueError(
            f"{path} holds {describe_ids(saved.num_samples)}, this run has {describe_ids(num_samples)}: it "
            "belongs to another data set. Resume with the data of the first run, or start without a checkpoint."
        )


def fill_missing(columns: Mapping[str, torch.Tensor], names: Sequence[str], count: int) -> dict[str, torch.Tensor]:
    """Return columns `(count,)` of some names, NaN where `columns` lack one."""
    return {name: columns[name] if name in columns else torch.full((count,), torch.nan) for name in names}


def _find_shards(path: Path) -> list[Path]:
    return sorted(file for file in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}") if _SHARD.search(file.stem))


def _number(path: Path) -> tuple[int, int]:
    if matched := _SHARD.search(path.stem):
        return int(matched[1]), int(matched[2])
    return 0, 0
