"""Online selection of the pairs that the model has yet to learn and a reference model has learnt."""

from collections.abc import Mapping

import torch

from hf_dissect.losses.pair_evidence import compute_pair_evidence, recover_losses
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import Selection, SelectionStrategy, keep_largest_known


class Learnability(SelectionStrategy):
    """A rule that keeps the candidates with the largest learnability, the loss minus the loss of a reference model.

    It is the score of JEST (arXiv 2406.17711, section 3.1) used for each pair by itself, as JEST's baseline of
    independent selection does; `Jest` uses it for pairs jointly. Both losses are those of the pair *among the
    candidates of the moment*:

        learnability_i = l(i; learner, batch) - l(i; reference, batch)

    With the softmax loss, `l` is the mean of both directions; with the sigmoid loss, it is the pair's own term,
    `-log sigmoid(logit_ii)`, the diagonal of JEST's matrix. Data that can be read in any order are scored by the
    reference once, before training. The ledger keeps the evidence of each pair, which does not depend on the batch
    (see `compute_pair_evidence`), and the reference's loss among the candidates follows from it. For a stream, the
    reference scores every batch.

    A pair that the reference could not score takes the median of its batch.
    """

    name = "learnability"
    usage = "choice"
    columns = ("reference_evidence",)
    reference = "stored"

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        """Keep the `k` most learnable candidates; see `SelectionStrategy.select`."""
        if scores.reference is not None:
            losses = scores.reference.own_loss
        else:
            losses = recover_losses(ledger.read("reference_evidence", scores.sample_id), _count_compared(scores))
        return keep_largest_known(scores.own_loss - losses, k, self.generator)

    def measure_reference(self, scores: CandidateScores) -> Mapping[str, torch.Tensor]:
        """Measure the evidence of each pair; see `SelectionStrategy.measure_reference`."""
        return {"reference_evidence": compute_pair_evidence(scores.own_loss, _count_compared(scores))}


def _count_compared(scores: CandidateScores) -> int:
    """Count the partners among which the loss of a pair finds its own: all (softmax), or a pair or none (sigmoid)."""
    return 2 if scores.kind == "sigmoid" else scores.num_candidates
