"""Table of the scores of all pairs, the most suspicious pair first."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from hf_dissect.auditing.embeddings import PairEmbeddings
from hf_dissect.data.arrow_columns import read_column
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.pair_columns import is_list, list_lengths
from hf_dissect.data.pairs import PairDataset
from hf_dissect.data.surrogates import MARK


def build_score_table(
    pairs: PairDataset,
    embeddings: PairEmbeddings,
    scores: Mapping[str, torch.Tensor | np.ndarray],
    more: Mapping[str, torch.Tensor] | None = None,
    sources: Mapping[str, pa.Array] | None = None,
    rank_by: np.ndarray | None = None,
) -> pa.Table:
    """Build a table of one row a pair, the most suspicious first, with unreadable pairs at the end.

    Args:
        pairs: The `n` pairs.
        embeddings: Embeddings of all of them.
        scores: `correlation`, `score`, `p_mismatched` and `local_fdr` of the readable pairs, `(number of readable
            pairs,)` each; NaN where a value is unknown.
        more: Further columns, `(n,)`: float32, NaN where a value is unknown, integers or bools.
        sources: Columns that identify the pairs in the user's data, `(n,)`, see `read_source_columns`.
        rank_by: Values of the readable pairs that rise with the rank; None for `score`.

    Returns:
        Table with `rank` (from 1), `sample_id`, `row` (of the data set), `place` (of the caption among those of the
        row), the columns of `sources`, `caption`, the scores, `is_clean` where the truth is known, the columns of
        `more`, and `problem`, the reason why a pair cannot be read, with the cause and the path. Missing values are
        null.
    """
    reasons = embeddings.bad_reason.numpy()
    (good,) = np.nonzero(reasons == BadReason.GOOD)
    order = good[np.argsort(np.asarray(scores["score"]) if rank_by is None else rank_by, kind="stable")]
    order = np.concatenate([order, np.nonzero(reasons != BadReason.GOOD)[0]])
    rank = np.arange(1, len(order) + 1)
    columns = {
        "rank": pa.array(rank, pa.int64(), mask=rank > len(good)),
        "sample_id": pa.array(embeddings.sample_id.numpy()[order]),
        "row": pa.array(pairs.row_of_pair[order], pa.int64()),
        "place": pa.array(pairs.place_of_pair[order], pa.int32()),
        **{name: values.take(pa.array(order)) for name, values in (sources or {}).items()},
        "caption": read_captions(pairs).take(pa.array(order)),
    }
    for name, values in scores.items():
        whole = np.full(len(reasons), np.nan, np.float32)
        whole[good] = np.asarray(values)
        columns[name] = _nullable(whole[order])
    if embeddings.is_clean is not None:
        columns["is_clean"] = pa.array(embeddings.is_clean.numpy()[order])
    for name, values in (more or {}).items():
        values_in_order = values.numpy()[order]
        columns[name] = _nullable(values_in_order) if values.is_floating_point() else pa.array(values_in_order)
    bad = {
        place: BadReason(reasons[place]).describe(embeddings.problems.get(place, "")) for place in order[len(good) :]
    }
    columns["problem"] = pa.array([bad.get(place) for place in order.tolist()], pa.string())
    return pa.table(columns)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file under a temporary name first, so that a half-written file is never found."""
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def read_captions(pairs: PairDataset) -> pa.Array:
    """Read the caption of each pair, string `(len(pairs),)`; null where it is missing or not text."""
    values = read_column(pairs.rows, pairs.columns.caption)
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if is_list(values.type):
        lengths = list_lengths(pa.chunked_array([values]))
        rows = pairs.row_of_pair
        starts = np.cumsum(lengths) - lengths
        places = pa.array(starts[rows] + pairs.place_of_pair, mask=lengths[rows] == 0)
        values = pc.list_flatten(values).take(places)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return pa.nulls(len(values), pa.string())
    return pc.utf8_ltrim(values.cast(pa.large_string()), characters=MARK)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float32(), from_pandas=True)
