"""Turn the rows of a streamed image-text table into (image, caption) pairs, with one row in memory at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch

from hf_dissect.data.images import image_content, is_feature_vector
from hf_dissect.data.pair_columns import NO_ROWS, PairColumns, find_truth_column, key_hash, select_undecoded
from hf_dissect.data.pair_keys import WEIGHT_KEY
from hf_dissect.data.pair_weights import check_weight_type, pick_weight
from hf_dissect.data.shards.skipped import record_skipped
from hf_dissect.data.streaming.stream_balance import StreamBalance


class PairStream(torch.utils.data.IterableDataset):
    """Pairs of a streamed table, with the same keys as those of `PairDataset`.

    Ids must not depend on the order of reading. They come from the id column (with several captions a row, by the hash
    of `"id#j"`); without one, an id is the hash of the image's content and the caption.

    Args:
        rows: Stream of images and captions.
        columns: Columns of the stream that make a pair.

    Attributes:
        skipped_shards: Shards that were not read to their end so far, with the reason; those that a worker of a
            `StreamLoader` met are added with its batches.
        balance: `StreamBalance` by which a `StreamLoader` visits the pairs; None for each once a pass.
    """

    num_samples = None
    balance: StreamBalance | None = None

    def __init__(self, rows: datasets.IterableDataset, columns: PairColumns) -> None:
        self.columns = columns
        self.rows = select_undecoded(rows, columns)
        self.skipped_shards: dict[str, str] = {}

    @classmethod
    def from_dataset(cls, dataset: datasets.IterableDataset, **names: str | None) -> "PairStream":
        """Wrap a stream, with columns named as in `PairColumns.recognise`.

        The first row is read if the stream does not know its columns.

        Raises:
            ValueError: If the stream has no rows, columns are missing, or weights are no numbers.
        """
        available = dataset.column_names
        if available is not None:
            columns = PairColumns.recognise(available, **names)
            if columns.weight is not None and dataset.features is not None:
                check_weight_type(columns.weight, dataset.features.arrow_schema.field(columns.weight).type)
            return cls(dataset, replace(columns, clean=find_truth_column(dataset, names.get("clean"))))
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(NO_ROWS)
        return cls(dataset, PairColumns.recognise(list(first), **names))

    @property
    def knows_truth(self) -> bool:
        """True if each pair says whether its caption belongs to its image."""
        return self.columns.clean is not None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the pairs of one pass.

        Raises:
            ValueError: If the stream has no rows.
        """
        empty = True
        for row in record_skipped(iter(self.rows), self.skipped_shards):
            empty = False
            yield from self.make_pairs(row)
        if empty and torch.utils.data.get_worker_info() is None:  # one of several workers may be left without rows
            raise ValueError(NO_ROWS)

    def make_pairs(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the pairs of one row of the stream, at least one.

        Raises:
            ValueError: If an id, task or truth is unusable.
        """
        image, captions = row[self.columns.image], row[self.columns.caption]
        if is_feature_vector(image):
            image = np.asarray(image, dtype=np.float32)
        several = isinstance(captions, list)
        for place, caption in enumerate((captions or [None]) if several else [captions]):
            pair = {"image": image, "caption": caption}
            pair["sample_id"] = self._make_id(row, caption, place if several else None)
            if self.columns.sample_id and isinstance(row[self.columns.sample_id], str):
                pair["key"] = row[self.columns.sample_id]
            if self.columns.task:
                pair["task_id"] = self._check_task(row[self.columns.task])
            if self.columns.clean:
                pair["is_clean"] = self._check_truth(row[self.columns.clean], caption, place)
            if self.columns.weight:
                pair[WEIGHT_KEY] = pick_weight(row[self.columns.weight], place if several else None)
            yield pair

    def make_visits(self, row: Mapping[str, Any], pass_number: int) -> Iterator[dict[str, Any]]:
        """Yield the pairs of one row as often as they are visited in a pass, which may be never.

        Raises:
            ValueError: If an id, task, truth or cluster is unusable, or the sampling file belongs to other data.
        """
        for pair in self.make_pairs(row):
            visits = 1 if self.balance is None else self.balance.count_visits(row, pair["sample_id"], pass_number)
            for _ in range(visits):
                yield pair

    def _make_id(self, row: Mapping[str, Any], caption: Any, place: int | None) -> int:
        name = self.columns.sample_id
        if name is None:
            text = str(caption).encode("utf-8", "surrogatepass")
            return key_hash((image_content(row[self.columns.image]) or b"") + text)
        key = row[name]
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ValueError(f"id_column={name!r} holds {key!r}; ids are integers or strings, and every row has one.")
        if isinstance(key, int) and key < 0:
            raise ValueError(f"id_column={name!r}: id {key} is negative; ids are integers from 0 upwards.")
        if place is not None:
            return key_hash(f"{key}#{place}")
        return key if isinstance(key, int) else key_hash(key)

    def _check_task(self, value: Any) -> int:
        if isinstance(value, int):
            return value
        raise ValueError(
            f"task_column={self.columns.task!r} holds {value!r}; in a stream tasks must be integers, since their "
            "number is not known beforehand."
        )

    def _check_truth(self, truth: Any, caption: Any, place: int) -> bool:
        if isinstance(truth, list):
            truth = truth[place] if place < len(truth) else None
        if caption is None and truth is None:
            return False  # a pair that will be skipped
        if not isinstance(truth, bool | int):
            raise ValueError(
                f"clean_column={self.columns.clean!r} holds {truth!r} for {str(caption)[:60]!r}; the truth "
                "of every pair is true or false. Mend the column, or rename it if it means something else."
            )
        return bool(truth)
