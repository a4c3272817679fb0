"""Offline selection: a frozen model scores all pairs before training, and only the best of them ever load."""

from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import Sampler

from hf_dissect.data.pairs import key_hash
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import CoresetOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy
from hf_dissect.settings import check_values


class Coreset(SelectionStrategy):
    """A rule that trains on the best pairs of the whole data set alone, as a frozen model scores them.

    The reference model scores every pair once before training, by the cosine of image and caption (CLIPScore,
    arXiv 2104.08718) or by the contrastive loss in a shuffled batch (CLIP loss). The pairs with the highest score, the
    selection ratio of all, are the coreset. It is shuffled each epoch, and no other pair is read or decoded.

    A step still stands for `B` candidates, so that steps and epochs count as with the other rules: it loads
    `k = round(ratio * B)` pairs of the coreset, and all of them train. `CoresetSampler` draws them.

    Args:
        score: See `CoresetOptions`.

    Raises:
        ValueError: If `score` is not one of the allowed values.
    """

    name = "coreset"
    columns = ("coreset_score",)
    reference = "before"
    keeps_all = True

    def __init__(self, score: str = CoresetOptions.score) -> None:
        super().__init__()
        check_values(CoresetOptions, {"score": score})
        self.score = score

    def needs_scores(self, epoch: int) -> bool:
        """Return False: the candidates are the coreset already."""
        return False

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep all candidates; see `SelectionStrategy.select`."""
        score = ledger.read("coreset_score", scores.sample_id)
        return Selection(indices=torch.arange(scores.num_candidates), priority=score)

    def measure_reference(self, scores: CandidateScores) -> Mapping[str, torch.Tensor]:
        """Measure the score of each pair; see `SelectionStrategy.measure_reference`."""
        if self.score == "clip_loss":
            return {"coreset_score": -scores.loss}
        image_embeds, text_embeds = scores.get_embeds()
        return {"coreset_score": 100 * (image_embeds * text_embeds).sum(-1).float().cpu()}


class CoresetSampler(Sampler[int]):
    """Sampler of the coreset, in another order each epoch, the same on every rank.

    The scores are read when an epoch begins, so they may come after the sampler is made. Pairs without a score are
    taken last.

    Args:
        ledger: Ledger with the column `coreset_score`.
        sample_ids: Ids of the pairs, int64 `(pairs,)`.
        ratio: Share of the pairs that is the coreset.
        seed: Seed of the orders.
    """

    def __init__(self, ledger: SampleLedger, sample_ids: torch.Tensor, ratio: float, seed: int) -> None:
        self._ledger = ledger
        self._sample_ids = sample_ids
        self._size = max(2, round(ratio * len(sample_ids)))
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return self._size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(key_hash(f"coreset/{self._seed}/{self._epoch}"))
        coreset = self.list_coreset()
        yield from coreset[torch.randperm(len(coreset), generator=generator)].tolist()

    def list_coreset(self) -> torch.Tensor:
        """Return the positions of the pairs of the coreset, int64, ascending; the earlier of equal pairs."""
        score = self._ledger.read("coreset_score", self._sample_ids).nan_to_num(-torch.inf, neginf=-torch.inf)
        return score.argsort(descending=True, stable=True)[: self._size].sort().values
