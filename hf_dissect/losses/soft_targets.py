"""Cross-entropies whose targets are spread over the pairs of all ranks."""

from collections.abc import Callable

import torch

from hf_dissect.losses.contrastive import MAX_LOGITS
from hf_dissect.losses.logit_rows import compute_losses_in_blocks


def soft_target_losses(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor | float,
    targets_of: Callable[[slice], torch.Tensor],
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """Compute the cross-entropy of each row of logits with a target that is spread over the columns.

    Args:
        rows: Embeddings of the own pairs `(b, D)` of unit length, with gradient.
        columns: Embeddings of the other modality, of the pairs of all ranks, `(N, D)`, with gradient.
        scale: Factor from cosines to logits.
        targets_of: Function from a slice of rows to the logarithms of their targets `(r, N)`; it must give the same
            when it is called again, and draw no random numbers.
        max_logits: Largest number of logits in a block. If there is more than one block, the backward pass computes
            each block again.

    Returns:
        Losses `(b,)`.
    """

    def losses_of(block: slice) -> torch.Tensor:
        with torch.no_grad():
            targets = targets_of(block).exp()
        return -(targets * (rows[block] * scale @ columns.T).log_softmax(1)).sum(1)

    return compute_losses_in_blocks(losses_of, len(rows), len(columns), max_logits)
