"""Files of the weights by which pairs are sampled, by cluster or by id, written by one run and read by others."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_dissect.data.cluster_balance import Balance, find_power_weights, find_visits
from hf_dissect.data.pair_columns import key_hash

SAMPLING_FILE = "sampling.parquet"
_HEADER = b"hf_dissect.sampling"


@dataclass(frozen=True)
class SamplingWeights:
    """Weights of pairs: their visits in an epoch, 1 where every pair is visited once.

    Attributes:
        name: Name of the file in messages.
        clusters: Weight by cluster, None for pairs without one; None if the file is by id alone.
        ids: Ids of pairs, int64 `(n,)`, ascending; None if the file is by cluster alone.
        weights: Weights of these pairs, float64 `(n,)`.
        num_samples: Number of pairs if the ids are row numbers; None for keys.
    """

    name: str
    clusters: Mapping[str | None, float] | None
    ids: np.ndarray | None
    weights: np.ndarray | None
    num_samples: int | None = None

    def look_up(self, ids: np.ndarray) -> np.ndarray:
        """Return the weights of pairs by their ids, float64 `(n,)`, NaN for those that the file lacks."""
        assert self.ids is not None and self.weights is not None
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[places] == ids, self.weights[places], np.nan)


def write_sampling_file(path: Path, balance: Balance, sample_ids: np.ndarray | None) -> None:
    """Write the visits of stored pairs as Parquet: `sample_id`, `weight`, and `cluster` if there is a column.

    Args:
        path: File to write.
        balance: Groups of pairs and their visits.
        sample_ids: Ids of the pairs, int64 `(pairs,)`; None for row numbers.
    """
    ids = np.arange(len(balance.codes)) if sample_ids is None else np.asarray(sample_ids, np.int64)
    columns = {"sample_id": pa.array(ids), "weight": pa.array(balance.visits_of_pairs)}
    if balance.cluster_codes is not None:
        names = pa.array(balance.clusters, pa.string())
        columns["cluster"] = names.take(pa.array(balance.cluster_codes)).dictionary_encode()
    _write(path, pa.table(columns), {"num_samples": len(ids) if sample_ids is None else None})


def write_cluster_weights(
    path: str | os.PathLike[str], sizes: Mapping[Any, int], strength: float = 0.5, max_visits: float = 8
) -> None:
    """Write the sampling file of clusters whose sizes are known, for a stream, which cannot count them beforehand.

    Args:
        path: File to write, Parquet.
        sizes: Number of pairs by cluster, text or a whole number; None for those without one.
        strength: Strength of the balance in [0, 1], as `data.balance_strength`.
        max_visits: Largest number of visits of a pair in an epoch, as `data.balance_max_visits`.

    Raises:
        ValueError: There are no clusters, one is empty, or an argument is out of its range.
    """
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"sizes={dict(sizes)!r}: name at least one cluster, each with at least one pair.")
    if not 0 <= strength <= 1 or max_visits < 1:
        raise ValueError(f"strength={strength} must be in [0, 1], and max_visits={max_visits} at least 1.")
    counts = np.array(list(sizes.values()), np.float64)
    weights = find_visits(counts, find_power_weights(counts, strength), max_visits)
    names = pa.array([None if name is None else str(name) for name in sizes], pa.string())
    _write(Path(path), pa.table({"cluster": names, "weight": pa.array(weights)}), {"num_samples": None})


def _write(path: Path, table: pa.Table, header: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    pq.write_table(table.replace_schema_metadata({_HEADER: json.dumps(header)}), temporary)
    os.replace(temporary, path)


def read_sampling_file(path: str | os.PathLike[str], name: str | None = None) -> SamplingWeights:
    """Read a sampling file: Parquet with `weight` and `cluster` or `sample_id`, or JSON of weights.

    The keys of JSON are clusters and ids alike, and stand for what the run looks up.

    Args:
        path: File, run folder, or folder of Parquet files (also below `data`).
        name: Name of the file in errors; None for `path`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds something else, or weights are negative, not finite or all 0.
    """
    name, path = str(path) if name is None else name, Path(path).expanduser()
    if path.suffix == ".json" and path.is_file():
        return _read_json(name, path)
    files = [path] if path.suffix == ".parquet" else sorted(_list_parquet(path))
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"data.sampling_file {name!r}: found neither {SAMPLING_FILE} nor another Parquet or JSON file; name the "
            "file, the folder of a run that balances, or a data set that holds it (hub:USER/REPO)."
        )
    try:
        tables = [pq.read_table(file) for file in files]
        table = pa.concat_tables(tables).combine_chunks()
        header = json.loads((tables[0].schema.metadata or {}).get(_HEADER, b"{}"))
        weights = table["weight"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        clusters, ids = None, None
        if "cluster" in table.column_names:
            clusters = _find_cluster_weights(name, table["cluster"].cast(pa.string()), table["weight"])
        if "sample_id" in table.column_names:
            ids = table["sample_id"].cast(pa.int64()).to_numpy(zero_copy_only=False)
        if clusters is None and ids is None:
            raise KeyError("cluster or sample_id")
    except (pa.ArrowException, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"data.sampling_file {name!r}: {files[0].name} holds no weights; it needs a column weight and cluster or "
            f"sample_id ({type(error).__name__}: {error})."
        ) from error
    _check_weights(name, weights)
    if ids is None:
        return SamplingWeights(name, clusters, None, None)
    order = np.argsort(ids, kind="stable")
    if len(ids) > 1 and (np.diff(ids[order]) == 0).any():
        raise ValueError(f"data.sampling_file {name!r}: its ids are repeated; each pair has one weight.")
    return SamplingWeights(name, clusters, ids[order], weights[order], header.get("num_samples"))


def _list_parquet(folder: Path) -> Iterator[Path]:
    if (folder / SAMPLING_FILE).is_file():
        yield folder / SAMPLING_FILE
        return
    yield from folder.glob("*.parquet")
    yield from folder.glob("data/*.parquet")


def _find_cluster_weights(name: str, clusters: pa.ChunkedArray, weights: pa.ChunkedArray) -> dict[str | None, float]:
    grouped = pa.table({"cluster": clusters, "weight": weights}).group_by("cluster")
    found = grouped.aggregate([("weight", "min"), ("weight", "max")]).to_pydict()
    lowest = dict(zip(found["cluster"], found["weight_min"], strict=True))
    for cluster, highest in zip(found["cluster"], found["weight_max"], strict=True):
        if highest != lowest[cluster]:
            raise ValueError(
                f"data.sampling_file {name!r}: the cluster {cluster!r} has several weights, from {lowest[cluster]:g} "
                f"to {highest:g}; give it one."
            )
    return lowest


def _read_json(name: str, path: Path) -> SamplingWeights:
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.sampling_file {name!r} is not JSON ({error}).") from error
    is_number = isinstance(given, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()
    )
    if not given or not is_number:
        raise ValueError(
            f'data.sampling_file {name!r}: JSON maps clusters or ids to weights, such as {{"cats": 0.5, "newts": 2}}.'
        )
    weights = np.array(list(given.values()), np.float64)
    _check_weights(name, weights)
    # As an id column: whole numbers are ids themselves, other text is hashed.
    ids = np.array([int(key) if key.isdecimal() and int(key) < 2**63 else key_hash(key) for key in given], np.int64)
    order = np.argsort(ids, kind="stable")
    return SamplingWeights(name, dict(zip(given, weights.tolist(), strict=True)), ids[order], weights[order])


def _check_weights(name: str, weights: np.ndarray) -> None:
    wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
    if len(wrong):
        raise ValueError(f"data.sampling_file {name!r}: the weight {wrong[0]:g} is not a finite number of at least 0.")
    if not len(weights) or not weights.any():
        raise ValueError(f"data.sampling_file {name!r}: no weight is above 0, so that no pair would be visited.")
