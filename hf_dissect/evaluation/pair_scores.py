"""Scores of whole data sets under the current weights, which show the pairs that the model takes for mismatched."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.evaluation.pair_encoder import PairEncoder
from hf_dissect.evaluation.passes import show_pass
from hf_dissect.selection.loop_hooks import Batch
from hf_dissect.selection.scoring import CandidateScores, score


def score_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: str,
    prepare: Callable[[Batch], Batch],
    autocast: Callable[[], AbstractContextManager],
    shown: bool = True,
) -> Iterator[tuple[Batch, CandidateScores]]:
    """Yield each batch on the device of the model, with the scores of its pairs.

    Each image and each caption is embedded once, though several pairs share it, see `PairEncoder`.

    Args:
        model: Dual encoder.
        batches: Batches of a `SelectionCollator`.
        kind: Loss of the model, "softmax" or "sigmoid".
        prepare: Function that moves a batch to the device.
        autocast: Function that returns the context of mixed precision.
        shown: False to show no progress bar.

    Yields:
        Batch and scores.
    """
    encoder = PairEncoder()
    with encoder.remember():
        for batch in map(prepare, show_pass(batches, "scoring pairs", shown=shown)):
            inputs, encode = forward_inputs(model, batch), partial(encoder, model, batch)
            yield batch, score(model, inputs, batch["sample_id"], kind=kind, autocast=autocast, encode=encode)


def join_correlations(
    scored: Iterable[tuple[Batch, CandidateScores]],
    gather: Callable[[Batch], Batch],
) -> dict[str, torch.Tensor]:
    """Join the correlations of all readable pairs.

    Args:
        scored: Batches with their scores, see `score_batches`.
        gather: Function that joins columns over the ranks and drops the rows that fill the last batch.

    Returns:
        Columns `sample_id` int64, `correlation` float32 and, if the truth is known, `is_clean` bool, each `(pairs,)`,
        on the CPU and the same on all ranks.
    """
    parts = []
    for batch, scores in scored:
        part: Batch = {name: batch[name] for name in ("sample_id", "bad_reason", "is_clean") if name in batch}
        part["correlation"] = scores.correlation.to(batch["sample_id"].device)
        parts.append(gather(part))
    joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    good = joined.pop("bad_reason") == 0
    return {name: values[good] for name, values in joined.items()}
