"""Online selection of a sub-batch that is learnable as a whole, by blocked Gibbs sampling."""

import torch
import torch.nn.functional as F

from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.options import JestOptions
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy
from hf_dissect.settings import check_values


class Jest(SelectionStrategy):
    """Joint example selection (JEST, arXiv 2406.17711, section 3.2).

    The loss of a pair depends on the pairs it is trained with, so a sub-batch is sampled jointly. From the candidates,
    the super-batch, `chunks` blocks are drawn one after another, each with probabilities proportional to
    `exp(learnability given the pairs drawn so far)`, without replacement. The filter ratio of the paper (0.8) is 1
    minus the selection ratio.

    Learnability is the loss of the learner minus the loss of the reference model, on the same pairs:

    - sigmoid: the loss is a sum over pairs of image and caption, so the gain of pair i is
      `s_ii + sum_j (s_ij + s_ji)` over the drawn pairs j, with the matrix `s` of the differences (the paper's
      algorithm). The first block is drawn by the diagonal.
    - softmax: the gain is the same quantity for the softmax loss, by how much the summed loss of the sub-batch grows
      with pair i: its own loss among the drawn pairs, and what it adds to theirs as one more negative. Among no other
      pairs, every loss is 0, so the first block is uniform.

    Args:
        chunks: See `JestOptions`.

    Raises:
        ValueError: If `chunks` is out of its range.
    """

    name = "jest"
    usage = "draw"
    reference = "batch"

    def __init__(self, chunks: int = JestOptions.chunks) -> None:
        super().__init__()
        check_values(JestOptions, {"chunks": chunks})
        self.chunks = chunks

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Draw `k` candidates jointly; see `SelectionStrategy.select`."""
        assert scores.reference is not None  # the selector scores every batch by the reference
        matrices = compute_logit_matrix(scores), compute_logit_matrix(scores.reference)
        draw = draw_for_sigmoid if scores.kind == "sigmoid" else draw_for_softmax
        handicap = self.find_handicap(scores.sample_id, ledger)
        indices = draw(*matrices, k=k, chunks=self.chunks, generator=self.generator, handicap=handicap)
        return Selection(indices.sort().values, priority=scores.loss - scores.reference.loss)


def compute_logit_matrix(scores: CandidateScores) -> torch.Tensor:
    """Compute the logits `(n, n)` of candidates, rows captions, columns images, in single precision."""
    image_embeds, text_embeds = map(promote_to_float32, scores.get_embeds())
    return (text_embeds @ image_embeds.T * scores.logit_scale + scores.logit_bias).detach()


def draw_for_sigmoid(
    learner: torch.Tensor,
    reference: torch.Tensor,
    *,
    k: int,
    chunks: int,
    generator: torch.Generator,
    handicap: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Draw a sub-batch that is learnable under the sigmoid loss.

    Args:
        learner: Logits of the learner `(n, n)`.
        reference: Logits of the reference `(n, n)`.
        k: Number of pairs to draw.
        chunks: Number of blocks.
        generator: Source of the random numbers, on the CPU.
        handicap: What lowers the logarithm of each pair's chance, `(n,)`.

    Returns:
        Positions, int64 `(k,)`, on the CPU, in the order of the draws.
    """
    signs = 2 * torch.eye(len(learner), device=learner.device) - 1
    learnable = F.softplus(-signs * learner) - F.softplus(-signs * reference)
    gain = learnable.diagonal().clone()
    drawn = torch.zeros(0, dtype=torch.int64)
    for size in _split(k, chunks):
        new = _draw(gain, drawn, size, generator, handicap)
        gain += learnable[new].sum(0) + learnable[:, new].sum(1)
        drawn = torch.cat([drawn, new])
    return drawn


def draw_for_softmax(
    learner: torch.Tensor,
    reference: torch.Tensor,
    *,
    k: int,
    chunks: int,
    generator: torch.Generator,
    handicap: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Draw a sub-batch that is learnable under the softmax loss, see `draw_for_sigmoid`."""
    directions = [(1, learner), (1, learner.T), (-1, reference), (-1, reference.T)]
    log_sums = [torch.full_like(learner[0], -torch.inf) for _ in directions]  # over the drawn pairs, for each row
    drawn = torch.zeros(0, dtype=torch.int64)
    for size in _split(k, chunks):
        gain = torch.zeros_like(learner[0])
        for (sign, logits), log_sum in zip(directions, log_sums, strict=True):
            added = F.softplus(logits[drawn] - log_sum[drawn, None]).sum(0)
            gain += sign * (F.softplus(log_sum - logits.diagonal()) + added) / 2
        new = _draw(gain, drawn, size, generator, handicap)
        log_sums = [
            torch.logaddexp(log_sum, logits[:, new].logsumexp(1))
            for (_, logits), log_sum in zip(directions, log_sums, strict=True)
        ]
        drawn = torch.cat([drawn, new])
    return drawn


def _split(k: int, chunks: int) -> list[int]:
    """Split `k` pairs into at most `chunks` blocks of nearly equal size."""
    return [len(part) for part in torch.arange(k).tensor_split(min(k, chunks))]


def _draw(
    gain: torch.Tensor, drawn: torch.Tensor, size: int, generator: torch.Generator, handicap: torch.Tensor | float
) -> torch.Tensor:
    """Draw positions with probabilities `softmax(gain)` without replacement, by the largest of Gumbel numbers."""
    noise = -torch.empty(len(gain)).exponential_(generator=generator).log()
    noisy = (gain.float().cpu() - handicap + noise).index_fill(0, drawn, -torch.inf)
    return noisy.topk(size).indices
