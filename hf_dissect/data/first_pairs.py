"""Check of the first pairs before training: collated as they will be, so that what fails for all fails at once."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hf_dissect.data.bad_rows import BadReason, TooManyBadRows
from hf_dissect.data.encoded_pictures import is_byte_array
from hf_dissect.data.images import is_feature_vector
from hf_dissect.data.pair_weights import check_collated
from hf_dissect.data.pairs import PairStream
from hf_dissect.data.problems import describe_problem, read_problems
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.loading import bare_model

NUM_FIRST = 16
"""Number of pairs that are collated before training."""


def check_first_pairs(collator: Callable[[Sequence[Any]], Any], **datasets: Any) -> None:
    """Collate the first pairs of data sets, and check the batch and that not all pictures are unreadable.

    A stream of training pairs is not read ahead: its first batch is checked by `BadRows`. The state of the random
    numbers stays as it is.

    Args:
        collator: Collator of the pairs.
        **datasets: Pairs, a dict of several, or None, by the name of their argument.

    Raises:
        TooManyBadRows: None of the first pictures can be read; the message has the first problems.
        ValueError: The batch of another collator lacks the ids, or holds something other than tensors.
    """
    for argument, pairs in datasets.items():
        parts = pairs if isinstance(pairs, dict) else {argument: pairs}
        for name, part in parts.items():
            with keep_random_state():
                rows = _read_first(part, argument)
                batch = collator(rows) if rows else None
            if batch is not None:
                check_batch(batch)
                check_collated(rows, batch)
                _check_pictures(argument if name == argument else f"{argument}[{name!r}]", batch)


def check_batch(batch: Any) -> None:
    """Check that a batch has the ids of its pairs, and tensors with a row for each pair.

    Args:
        batch: Output of a collator.

    Raises:
        ValueError: It has not; the message names the way out.
    """
    way_out = (
        "A collator of your own calls hf_dissect.SelectionCollator and adds to its batch, or returns a dict of "
        "tensors with sample_id, the int64 ids of the rows that it is given."
    )
    if not isinstance(batch, Mapping):
        raise ValueError(f"data_collator returns {type(batch).__name__}, not a dict of tensors. {way_out}")
    ids = batch.get("sample_id")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = "no sample_id" if ids is None else f"a sample_id of {_describe(ids)}"
        raise ValueError(f"data_collator returns {found}, only {', '.join(map(str, batch))}. {way_out}")
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != len(ids):
            raise ValueError(
                f"data_collator returns {_describe(value)} as {name!r} for {len(ids)} pairs; pairs are selected from "
                f"tensors with a row for each pair. {way_out}"
            )


def check_images_fit(model: Any, pairs: Any) -> None:
    """Check that the images are of the kind that a model reads: feature vectors of its size, or pictures.

    Only the first pair is checked; a stream is not read ahead.

    Args:
        model: Dual encoder, wrapped or not.
        pairs: Training pairs, or None.

    Raises:
        ValueError: The images are of another kind or dimension.
    """
    if not hasattr(pairs, "__len__"):
        return
    image, wanted = pairs[0]["image"], find_feature_size(model, "vision")
    found = len(image) if is_feature_vector(image) else None
    is_unclear = image is None or (wanted is None and is_byte_array(image))  # perhaps a damaged file
    if not is_unclear and found != wanted:
        raise ValueError(
            f"image_column: the data hold {_describe_images(found)}, the model ({type(bare_model(model)).__name__}) "
            f"reads {_describe_images(wanted)}. Name the right column with image_column, or choose the model to fit."
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _read_first(pairs: Any, argument: str) -> list[Any]:
    if isinstance(pairs, PairStream):
        return [] if argument == "train_dataset" else list(itertools.islice(pairs, NUM_FIRST))
    if not (hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__")):
        return []  # no data, or a torch stream, which may not be read twice
    indices = range(min(NUM_FIRST, len(pairs)))
    if hasattr(pairs, "__getitems__"):
        return pairs.__getitems__(list(indices))
    return [pairs[index] for index in indices]


def _check_pictures(argument: str, batch: Mapping[str, torch.Tensor]) -> None:
    if "bad_reason" not in batch:
        return
    reasons = batch["bad_reason"]
    tried = (reasons == BadReason.GOOD) | (reasons == BadReason.IMAGE)
    if not tried.any() or (reasons[tried] != BadReason.IMAGE).any() or int(tried.sum()) < min(4, len(reasons)):
        return
    problems = read_problems(batch)
    first = [f"{describe_problem(problem)} (id {int(batch['sample_id'][row])})" for row, problem in problems.items()]
    raise TooManyBadRows(
        f"{argument}: none of the first {int(tried.sum())} pictures can be read. First problems: "
        f"{'; '.join(first[:3])}. Mend the paths or the files, name the column of the pictures with image_column, "
        "or leave these rows out."
    )


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave the random streams of Python, NumPy and torch as they were, whatever the block draws from them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _describe_images(dim: int | None) -> str:
    return "pictures" if dim is None else f"feature vectors of {dim} numbers"
