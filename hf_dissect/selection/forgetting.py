"""Online selection by forgetting events: the pairs that were learnt and lost again most often."""

from collections.abc import Mapping

import torch

from hf_dissect.losses.contrastive import MAX_LOGITS
from hf_dissect.losses.logit_rows import split_rows
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import ForgettingOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy
from hf_dissect.settings import check_values

_TIE = 1e-6
"""Difference of two cosines that is rounding, as between two captions of one image."""


class Forgetting(SelectionStrategy):
    """A rule that keeps the candidates that were forgotten most often (ICLR 2019, arXiv 1812.05159).

    A pair is learnt at a visit if its image and its caption each rank the other first among the candidates. It is
    forgotten when it was learnt at one visit and is not at the next. A pair that was never learnt counts as forgotten
    infinitely often, as in the paper, which keeps such pairs; with mismatched pairs in the data, which are never
    learnt either, they can be treated as the least forgotten ones instead. The paper counts during one run and prunes
    for the next; here, the events so far decide in every step.

    A pair that was never seen takes the median of its batch. Equals are chosen at random, so a first epoch trains on
    random subsets.

    Args:
        never_learnt: See `ForgettingOptions`.

    Raises:
        ValueError: If the argument is not one of the allowed values.
    """

    name = "forgetting"
    usage = "choice"
    columns = ("learnt", "forgotten")
    records_pairs_alone = True

    def __init__(self, never_learnt: str = ForgettingOptions.never_learnt) -> None:
        super().__init__()
        check_values(ForgettingOptions, {"never_learnt": never_learnt})
        self.never_learnt = never_learnt

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` most often forgotten candidates; see `SelectionStrategy.select`."""
        count = ledger.read("forgotten", scores.sample_id)
        if self.never_learnt == "first":
            most = count[count.isfinite()].max() if count.isfinite().any() else torch.tensor(0.0)
            count = torch.where(count.isinf(), most + 1, count)
        else:
            count = torch.where(count.isinf(), -1.0, count)
        known = ~count.isnan()
        count = torch.where(known, count, count[known].median() if known.any() else 0.0)
        shuffled = torch.randperm(len(count), generator=self.generator)
        order = shuffled[count[shuffled].argsort(descending=True, stable=True)]
        return Selection(indices=order[:k].sort().values, priority=count)

    def measure(self, scores: CandidateScores, ledger: SampleLedger) -> dict[str, torch.Tensor]:
        """Find the candidates that are learnt; see `SelectionStrategy.measure`."""
        return {"learnt": find_learnt(*scores.get_embeds()).float().cpu()}

    def record(
        self,
        sample_id: torch.Tensor,
        correlation: torch.Tensor,
        ledger: SampleLedger,
        measured: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Count the forgetting events; see `SelectionStrategy.record`."""
        if not measured:
            return
        learnt, was_learnt = measured["learnt"], ledger.read("learnt", sample_id)
        count = ledger.read("forgotten", sample_id).nan_to_num(nan=torch.inf, posinf=torch.inf)
        first_time = torch.where(learnt == 1, 0.0, torch.inf)
        event = (was_learnt == 1) & (learnt == 0)
        ledger.write("forgotten", sample_id, torch.where(count.isinf(), first_time, count + event))
        ledger.write("learnt", sample_id, learnt)


@torch.no_grad()
def find_learnt(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Find the pairs whose image and caption each rank the other first; a tie counts as first.

    Args:
        image_embeds: Embeddings `(B, D)` of unit length.
        text_embeds: Embeddings `(B, D)` of unit length.

    Returns:
        Bool `(B,)`.
    """
    parts = []
    for rows in split_rows(len(text_embeds), len(image_embeds), MAX_LOGITS):
        is_first = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=text_embeds.device)
        for own, others in ((text_embeds, image_embeds), (image_embeds, text_embeds)):
            cosines = own[rows] @ others.T
            is_first &= cosines.diagonal(rows.start) >= cosines.amax(1) - _TIE
        parts.append(is_first)
    return torch.cat(parts)
