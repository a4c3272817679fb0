"""Exchange captions between images that look alike, as in scraped data: a wrong caption then nearly fits."""

import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_dissect.data.arrow_columns import is_list, list_lengths, read_chunked_column, read_column
from hf_dissect.data.noise import apply_caption_order, check_rate_and_seed, find_caption_column, find_row_of_pair
from hf_dissect.data.pair_columns import IMAGE_COLUMNS
from hf_dissect.data.stored_features import FEATURES_COLUMN
from hf_dissect.distributed import get_rank_and_world_size

_NEAREST = 64
_BLOCK = 512
_MOST_TOGETHER = 32_768  # rows among which neighbours are looked for: the work grows with their square
_SAME_PICTURE = 0.9999  # cosine from which two rows hold the same picture


def exchange_between_neighbours(
    dataset: Dataset,
    *,
    rate: float,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Give a share of the pairs the caption of an image that looks alike, and record which pairs these are.

    Exactly `round(rate * num_pairs)` pairs are mismatched, as evenly over the rows as the rate allows. Rows are mated
    in a random order, each with the nearest row that has captions left, by the cosine of their centred features; mates
    exchange captions. No caption is lost or repeated, and none goes to a row that has the same text or picture.

    Args:
        dataset: Rows with stored features of the images and a caption (string) or a list of captions.
        rate: Share of the pairs to mismatch, in [0, 1].
        seed: The same seed gives the same noise.
        image_column: Column with the features where there is no `image_features`; None recognises the usual names.
        caption_column: Column with the captions, see `shuffle_captions`.
        clean_column: Column for the truth, see `shuffle_captions`.

    Returns:
        The dataset with the captions exchanged and the truth, see `shuffle_captions`.

    Raises:
        ValueError: If there are no features, or the rate is impossible on this dataset.
    """
    check_rate_and_seed(rate, seed)
    column = find_caption_column(dataset, caption_column)
    captions = read_column(dataset, column)
    row_of_pair = find_row_of_pair(captions)
    texts = captions.flatten() if is_list(captions.type) else captions
    vectors = _read_features(dataset, _find_features(dataset, image_column))
    exchange = _Exchange(vectors, row_of_pair, texts, np.random.default_rng(seed))
    order = exchange.draw_order(round(rate * len(row_of_pair)))
    return apply_caption_order(dataset, order, caption_column=column, clean_column=clean_column)


class _Exchange:
    """Exchange of captions between near rows.

    Args:
        vectors: Features, float32 `(rows, dim)`; NaN in rows without usable ones.
        row_of_pair: Row of each pair, int64 `(num_pairs,)`.
        texts: Caption of each pair, strings `(num_pairs,)`.
        rng: Source of all that is random.
    """

    def __init__(
        self, vectors: np.ndarray, row_of_pair: np.ndarray, texts: pa.Array, rng: np.random.Generator
    ) -> None:
        self._usable = np.isfinite(vectors).all(1)
        self._vectors = _centre(vectors, self._usable)
        raw = np.ascontiguousarray(np.nan_to_num(vectors))
        unknown = np.cumsum(~self._usable)  # rows without features are pictures of their own
        picture = np.unique(raw.view(f"V{raw.strides[0]}").ravel(), return_inverse=True)[1] if len(raw) else unknown
        self._picture = np.where(self._usable, picture, len(raw) + unknown)
        self._row = row_of_pair
        self._text = texts.dictionary_encode(null_encoding="encode").indices.to_numpy().astype(np.int64)
        self._num_texts = int(self._text.max(initial=0)) + 1
        self._own = np.unique(self._picture[row_of_pair] * self._num_texts + self._text)
        self._rng = rng

    def draw_order(self, count: int) -> np.ndarray:
        """Return a permutation `(num_pairs,)` that gives exactly `count` pairs the caption of a near row."""
        order = np.arange(len(self._row))
        if count == 0:
            return order
        first, second, turn = self._list_exchanges()
        chosen = np.argsort(turn, kind="stable")[: count // 2]
        order[first[chosen]], order[second[chosen]] = second[chosen], first[chosen]
        missing = self._insert_further(order, count - 2 * len(chosen))
        if missing:
            raise ValueError(
                f"rate (noise_rate): only {count - missing} of the {count} captions to mismatch can be exchanged "
                "between near neighbours (noise_kind: neighbours): the other rows have the same captions or pictures, "
                "no usable features, or too many captions. Use a lower rate, or noise_kind random."
            )
        return order

    def _list_exchanges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs that may exchange captions, int64 `(n,)` twice, and when it is the turn of each."""
        room = np.bincount(self._row, minlength=len(self._vectors))
        start = np.cumsum(room) - room
        shuffled = np.lexsort((self._rng.random(len(self._row)), self._row))  # within each row
        mates = list(self._mate(np.where(self._usable, room, 0)))
        used = np.zeros_like(room)
        first: list[np.ndarray] = []
        second: list[np.ndarray] = []
        turn: list[np.ndarray] = []
        for (one, other, number), jitter in zip(mates, self._rng.random(len(mates)), strict=True):
            for row, pairs in ((one, first), (other, second)):
                begin = start[row] + used[row]
                pairs.append(shuffled[begin : begin + number])
                used[row] += number
            turn.append((np.arange(number) + jitter) / number)  # the first of all mates come before the second of any
        if not mates:
            return (np.empty(0, np.int64),) * 2 + (np.empty(0),)
        a, b = np.concatenate(first), np.concatenate(second)
        fits = self._fits(a, b) & self._fits(b, a)
        return a[fits], b[fits], np.concatenate(turn)[fits]

    def _mate(self, room: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yield two near rows and the number of captions that they exchange; every caption at most once."""
        lowest, highest = (np.full(len(room), value) for value in (self._num_texts, -1))
        np.minimum.at(lowest, self._row, self._text)
        np.maximum.at(highest, self._row, self._text)
        # Rows that have one text only may not mate with others of that text.
        text = np.where(lowest == highest, lowest, -1 - np.arange(len(room)))
        rows = self._rng.permutation(np.flatnonzero(room))
        for part in np.array_split(rows, max(1, -(-len(rows) // _MOST_TOGETHER))):
            mated = True
            while mated and len(part) > 1:
                mated = False
                for row, nearest in zip(part, self._find_nearest(part, text), strict=True):
                    for other in nearest:
                        number = min(room[row], room[other])
                        if number:
                            yield int(row), int(other), int(number)
                            room[[row, other]] -= number
                            mated = True
                part = part[room[part] > 0]

    def _find_nearest(self, rows: np.ndarray, text: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the nearest rows of each row, the nearest first, without those that may not give it a caption."""
        vectors = torch.from_numpy(self._vectors[rows])
        picture, of_text = (torch.from_numpy(np.ascontiguousarray(value[rows])) for value in (self._picture, text))
        k = min(_NEAREST, len(rows))
        for begin in _show(range(0, len(rows), _BLOCK), "near neighbours"):
            part = slice(begin, begin + _BLOCK)
            cosine = vectors[part] @ vectors.T
            barred = (picture[part, None] == picture) | (of_text[part, None] == of_text) | (cosine > _SAME_PICTURE)
            values, found = cosine.masked_fill_(barred, -torch.inf).topk(k)
            for near, good in zip(found.numpy(), values.isfinite().numpy(), strict=True):
                yield rows[near[good]]

    def _insert_further(self, order: np.ndarray, number: int) -> int:
        """Let further pairs take part in exchanges, which become cycles of three or more, and return the shortage."""
        candidates = np.flatnonzero((order == np.arange(len(order))) & self._usable[self._row])
        for pair in _show(self._rng.permutation(candidates) if number else (), "further captions"):
            receiver = np.flatnonzero(order != np.arange(len(order)))
            giver, cosine = order[receiver], self._vectors @ self._vectors[self._row[pair]]
            nearness = np.stack([cosine[self._row[receiver]], cosine[self._row[giver]]])
            one = np.full(len(receiver), pair)
            fits = self._fits(receiver, one) & self._fits(one, giver) & (nearness.max(0) <= _SAME_PICTURE)
            if fits.any():
                best = np.where(fits, nearness.sum(0), -np.inf).argmax()
                order[pair], order[receiver[best]] = giver[best], pair
                number -= 1
            if not number:
                break
        return number

    def _fits(self, receiver: np.ndarray, giver: np.ndarray) -> np.ndarray:
        """Return where the caption of one pair is none of the picture of another pair, bool `(n,)`."""
        return ~np.isin(self._picture[self._row[receiver]] * self._num_texts + self._text[giver], self._own)


def _find_features(dataset: Dataset, image_column: str | None) -> str:
    """Return the column with the stored features of the images.

    Raises:
        ValueError: If there is none.
    """
    names = (FEATURES_COLUMN, *((image_column,) if image_column else IMAGE_COLUMNS))
    for name in names:
        if name in dataset.column_names:
            kind = dataset.features.arrow_schema.field(name).type
            if is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
                return name
    raise ValueError(
        "noise_kind neighbours (data.noise_kind): the data have no stored features of the images, by which near "
        f"neighbours are found (columns: {', '.join(dataset.column_names)}). Name a .npz file of them with "
        "data.image_features, or an order of the captions that you made yourself with data.noise_permutation."
    )


def _read_features(dataset: Dataset, column: str) -> np.ndarray:
    """Return the features, float32 `(rows, dim)`, NaN in rows that have none or of another length than most."""
    values = read_chunked_column(dataset, column)
    lengths = list_lengths(values)
    dim = int(np.bincount(lengths[lengths > 0]).argmax()) if (lengths > 0).any() else 0
    vectors = np.full((len(lengths), dim), np.nan, np.float32)
    begin = 0
    for chunk in values.chunks:
        good = lengths[begin : begin + len(chunk)] == dim
        flat = pc.list_flatten(chunk.filter(pa.array(good))).cast(pa.float32())
        vectors[begin : begin + len(chunk)][good] = flat.to_numpy(zero_copy_only=False).reshape(-1, dim)
        begin += len(chunk)
    return vectors


def _centre(vectors: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return features without their mean, of unit length; zero in rows that are not usable."""
    centred = np.zeros_like(vectors)
    if usable.any():
        centred[usable] = vectors[usable] - vectors[usable].mean(0, dtype=np.float64).astype(np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def _show(items: object, name: str) -> tqdm:
    """Return the items with a progress bar, on the first process, if they take more than two seconds."""
    interval = 0.1 if sys.stderr.isatty() else 5.0  # in a log file each refresh is a new line
    hidden = get_rank_and_world_size()[0] != 0
    return tqdm(items, name, disable=hidden, dynamic_ncols=True, delay=2.0, mininterval=interval, leave=False)
