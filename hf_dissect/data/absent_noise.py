"""Give images the captions of images that are left out of the data, so that these are nowhere to be found."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_dissect.data.arrow_columns import is_list, read_column
from hf_dissect.data.noise import (
    check_rate_and_seed,
    find_caption_column,
    find_row_of_pair,
    move_captions,
    read_truth,
    record_truth,
)
from hf_dissect.data.pair_columns import find_truth_column
from hf_dissect.data.same_pictures import number_pictures

_LEAST_KEPT = 0.5  # of the pairs that stay where no caption occurs twice


def replace_by_absent(
    dataset: Dataset,
    *,
    rate: float,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Leave images out, give their captions to a share of the other pairs, and record which pairs these are.

    With shuffled captions, the true image of a wrong caption is in the data; here it is not (open-set noise). Rows are
    left out in a random order until they have enough captions: of N pairs, about `N / (1 + rate)` stay. No row is
    left out that could stay. Of the pairs that stay, exactly `round(rate * their number)` are mismatched. Each of them
    gets another caption of a row that is left out; the caption that it had is gone.

    Rows with the same picture stay, or are left out, together (see `number_pictures` for what counts as the same). A
    caption is only given away if no row that stays has the same text, since an image that it fits would still be
    there, and if it is not known to be wrong. Where captions occur many times, as in class folders, rows with the
    same first caption follow each other in the order, so that a class goes as a whole.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        rate: Share of the pairs that stay to mismatch, in [0, 1].
        seed: The same seed gives the same noise.
        image_column: Column with the images or their features; None recognises the usual names.
        caption_column: Column with the captions, see `shuffle_captions`. Stored features of captions follow them.
        clean_column: Column for the truth, see `shuffle_captions`.

    Returns:
        The rows that stay, in their order, with the captions replaced and the truth, see `shuffle_captions`. Other
        columns, images included, are shared with the input.

    Raises:
        ValueError: If the rate is impossible on this dataset, or there is no caption column.
    """
    check_rate_and_seed(rate, seed)
    column = find_caption_column(dataset, caption_column)
    captions = read_column(dataset, column)
    row_of_pair = find_row_of_pair(captions)
    texts = captions.flatten() if is_list(captions.type) else captions
    may_go = _find_usable(texts) & _find_trusted(dataset, clean_column, row_of_pair)
    departures = _Departures(number_pictures(dataset, image_column), row_of_pair, texts, may_go, rate)
    rng = np.random.default_rng(seed)
    departures.choose(rng)
    stays = departures.list_staying_rows()
    order = np.arange(len(row_of_pair))
    receivers = rng.choice(departures.list_staying_pairs(), departures.wanted, replace=False)
    order[receivers] = rng.permutation(departures.list_givers())[: len(receivers)]
    replaced = move_captions(dataset, column, order)
    noisy = record_truth(replaced, captions, order == np.arange(len(order)), order, clean_column)
    return noisy if len(stays) == len(dataset) else noisy.select(stays)


class _Departures:
    """Pictures that are left out, and what of their captions may be given to the others.

    Args:
        picture: Picture of each row, int64 `(rows,)`.
        row_of_pair: Row of each pair, int64 `(num_pairs,)`.
        texts: Caption of each pair, strings `(num_pairs,)`.
        may_go: True for captions that another image may get, bool `(num_pairs,)`.
        rate: Share of the pairs that stay to mismatch.
    """

    def __init__(
        self, picture: np.ndarray, row_of_pair: np.ndarray, texts: pa.Array, may_go: np.ndarray, rate: float
    ) -> None:
        self._rate = rate
        self._picture = picture
        self._picture_of_pair = picture[row_of_pair]
        self._text = texts.dictionary_encode(null_encoding="encode").indices.to_numpy().astype(np.int64)
        self._may_go = may_go
        self._num_pictures = int(picture.max(initial=-1)) + 1
        self._num_rows = np.bincount(picture, minlength=self._num_pictures)
        self._text_of_pair, self._goes = self._text.tolist(), may_go.tolist()  # lists, since they are read one by one
        by_picture = np.argsort(self._picture_of_pair, kind="stable")
        ends = np.cumsum(np.bincount(self._picture_of_pair, minlength=self._num_pictures))[:-1]
        self._pairs = [part.tolist() for part in np.split(by_picture, ends)]
        num_texts = int(self._text.max(initial=-1)) + 1
        self._staying = np.bincount(self._text, minlength=num_texts).tolist()  # pairs that stay, by text
        self._gone = [0] * num_texts  # captions that may go and are left out, by text
        self._num_staying = len(row_of_pair)
        self._num_gone = self._usable = 0
        self._is_out = np.zeros(self._num_pictures, bool)

    @property
    def wanted(self) -> int:
        """Number of pairs to mismatch, of those that stay."""
        return round(self._rate * self._num_staying)

    def choose(self, rng: np.random.Generator) -> None:
        """Choose the pictures to leave out.

        Raises:
            ValueError: If too few pairs would stay.
        """
        if self.wanted == 0:
            return
        taken, later = [], []
        for number in self._draw_order(rng):
            # A picture in many rows may have more captions than are missing, where others have as many.
            if self._fits(number):
                self._leave(number)
                taken.append(number)
            else:
                later.append(number)
        for number in sorted(later, key=lambda number: self._num_rows[number]):
            if self._usable >= self.wanted:
                break
            self._leave(number)
            taken.append(number)
        for number in reversed(taken):
            self._return(number)
            if self._usable < self.wanted:
                self._leave(number)
        self._check()

    def list_staying_rows(self) -> np.ndarray:
        """Return the rows that stay, int64 `(n,)`."""
        return np.flatnonzero(~self._is_out[self._picture])

    def list_staying_pairs(self) -> np.ndarray:
        """Return the pairs of the rows that stay, int64 `(n,)`."""
        return np.flatnonzero(~self._is_out[self._picture_of_pair])

    def list_givers(self) -> np.ndarray:
        """Return the pairs of rows that are left out whose caption no row that stays has, int64 `(n,)`."""
        unique = np.array(self._staying, np.int64) == 0
        return np.flatnonzero(self._is_out[self._picture_of_pair] & self._may_go & unique[self._text])

    def _draw_order(self, rng: np.random.Generator) -> list[int]:
        """Return the pictures that have a caption to give, at random, those with the same first caption together."""
        first = np.full(self._num_pictures, len(self._text))
        usable = np.flatnonzero(self._may_go)
        np.minimum.at(first, self._picture_of_pair[usable], usable)
        numbers = np.flatnonzero(first < len(self._text))
        rank = rng.permutation(len(self._staying))[self._text[first[numbers]]]
        return numbers[np.lexsort((rng.random(len(numbers)), rank))].tolist()

    def _fits(self, number: int) -> bool:
        """Return True if all captions of a picture are needed, as far as each of them can be given away."""
        pairs = self._pairs[number]
        return self._num_gone + len(pairs) <= round(self._rate * (self._num_staying - len(pairs)))

    def _leave(self, number: int) -> None:
        for pair in self._pairs[number]:
            text = self._text_of_pair[pair]
            self._staying[text] -= 1
            self._gone[text] += self._goes[pair]
            if self._staying[text] == 0:
                self._usable += self._gone[text]
        self._count(number, 1)

    def _return(self, number: int) -> None:
        for pair in self._pairs[number]:
            text = self._text_of_pair[pair]
            if self._staying[text] == 0:
                self._usable -= self._gone[text]
            self._staying[text] += 1
            self._gone[text] -= self._goes[pair]
        self._count(number, -1)

    def _count(self, number: int, sign: int) -> None:
        self._is_out[number] = sign > 0
        self._num_staying -= sign * len(self._pairs[number])
        self._num_gone += sign * len(self._pairs[number])

    def _check(self) -> None:
        total = len(self._text)
        enough = self._num_staying >= _LEAST_KEPT * total / (1 + self._rate)
        if 0 < self.wanted <= self._usable and enough:
            return
        raise ValueError(
            f"rate (noise_rate): {self._rate} of the captions cannot be replaced by those of images that are left out "
            f"(noise_kind: absent): only {self._num_staying} of {total} pairs stay, and {self._usable} captions. "
            f"The data have {self._num_pictures} different images and {len(self._staying)} different captions. A "
            "caption is not given away if an image that stays has it, too, if it is missing, or if it is known to be "
            "wrong. Use another rate, more data, or noise_kind random."
        )


def _find_usable(texts: pa.Array) -> np.ndarray:
    """Return which captions have words, bool `(num_pairs,)`."""
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False).to_numpy(zero_copy_only=False)


def _find_trusted(dataset: Dataset, clean_column: str | None, row_of_pair: np.ndarray) -> np.ndarray:
    """Return which captions are not known to be wrong already, bool `(num_pairs,)`."""
    column = find_truth_column(dataset, clean_column)
    if column is None or column not in dataset.column_names:
        return np.ones(len(row_of_pair), bool)
    return pc.fill_null(read_truth(dataset, column, row_of_pair), True).to_numpy(zero_copy_only=False)
