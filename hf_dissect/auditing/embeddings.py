"""Embeddings of a whole data set, with the keys of its pairs and the reasons why some cannot be read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from hf_dissect.data.problems import PROBLEM_KEY, read_problems
from hf_dissect.selection.scoring import CandidateScores

_KEPT = ("sample_id", "image_key", "caption_key", "bad_reason", PROBLEM_KEY, "is_clean")


@dataclass(frozen=True)
class PairEmbeddings:
    """Embeddings of `n` pairs, in their order in the data set, on the CPU.

    Attributes:
        image: Embeddings of the images, float32 `(n, D)`, unit length; meaningless for an unreadable pair.
        text: Embeddings of the captions, likewise.
        sample_id: Sample ids, int64 `(n,)`.
        image_key: Keys of the images, int64 `(n,)`, equal where pairs share an image.
        caption_key: Keys of the captions, likewise.
        bad_reason: Reasons why pairs cannot be read, int8 `(n,)`, see `BadReason`.
        is_clean: Truth, bool `(n,)`; None where it is unknown.
        problems: Problems of unreadable pairs by position, see `hf_dissect.data.problems`.
    """

    image: torch.Tensor
    text: torch.Tensor
    sample_id: torch.Tensor
    image_key: torch.Tensor
    caption_key: torch.Tensor
    bad_reason: torch.Tensor
    is_clean: torch.Tensor | None = None
    problems: Mapping[int, str] = field(default_factory=dict)


def join_embeddings(
    scored: Iterable[tuple[Mapping[str, torch.Tensor], CandidateScores]],
    gather: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> PairEmbeddings:
    """Join the embeddings of all batches and ranks; the same on all ranks.

    Args:
        scored: Batches of the pairs with their scores, see `hf_dissect.evaluation.pair_scores.score_batches`.
        gather: Function that joins columns over the ranks, without the rows that fill up the last batch.
    """
    parts: list[dict[str, torch.Tensor]] = []
    problems: dict[int, str] = {}
    count = 0
    for batch, scores in scored:
        part = {name: batch[name] for name in _KEPT if name in batch}
        part["image"], part["text"] = scores.get_embeds()
        gathered = {name: values.cpu() for name, values in gather(part).items()}
        problems |= {count + place: problem for place, problem in read_problems(gathered).items()}
        gathered.pop(PROBLEM_KEY, None)
        count += len(gathered["sample_id"])
        parts.append(gathered)
    return PairEmbeddings(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, problems=problems)
