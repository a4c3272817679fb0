"""The contrastive losses of CLIP and SigLIP, weighted per pair and with the negatives of all ranks."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size
from hf_dissect.losses.logit_rows import (
    compute_logits,
    compute_losses_in_blocks,
    find_false_negatives,
    promote_to_float32,
    sigmoid_losses,
    softmax_losses,
    split_rows,
)
from hf_dissect.losses.sigmoid_ring import sigmoid_ring_loss

KINDS = ("softmax", "sigmoid")
Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from the losses of the own pairs and the numbers of pairs that they were found among, both `(b,)` without
gradient, to the weights `(b,)`. The loss is `-log q`, with the probability `q` that the model gives the pair: of its
partner among all (softmax, mean of both directions), or of being a pair (sigmoid)."""
RowLosses = Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor]
"""Function from logits `(r, c)`, the column of the first true pair and a mask to losses `(r,)`, such as
`softmax_losses`; or to losses and those without a regulariser `(r, 2)`, of which the latter make weights."""
MAX_LOGITS = 2**24  # 64 MiB in single precision: enough to keep a GPU busy, and small compared with a model


class ContrastiveLoss:
    """Mean over the pairs of `weight * loss`, with the pairs of all ranks as negatives of each other.

    On one rank, the model's own logits are used if it returns any, so that the plain case is the plain computation.
    Otherwise the logits are computed from the embeddings, in at least single precision, and each rank computes the
    rows of its own pairs only. The mean over ranks, which DDP takes of the gradients, is then the loss of the union of
    the batches. Logits beyond `max_logits` are computed in blocks of rows, which are not kept.

    - softmax: the embeddings of all ranks are gathered with gradient (the local form of open_clip). If there is more
      than one block, the backward pass computes each block again.
    - sigmoid: the images travel around a ring of ranks, see `sigmoid_ring_loss`.

    Args:
        kind: `"softmax"` (CLIP, arXiv 2103.00020, figure 3) or `"sigmoid"` (SigLIP, arXiv 2303.15343, equation 1).
        mask_false_negatives: True to exclude pairs that share an image or a caption from each other's negatives.
        max_logits: Largest number of logits in a block; a block has at least one row.
        row_losses: Loss of rows of logits in place of the cross-entropy, for softmax.

    Raises:
        ValueError: If `kind` is neither of the two.
    """

    def __init__(
        self,
        kind: str = "softmax",
        mask_false_negatives: bool = False,
        max_logits: int = MAX_LOGITS,
        row_losses: RowLosses = softmax_losses,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}.")
        self.kind = kind
        self.mask_false_negatives = mask_false_negatives
        self.max_logits = max_logits
        self.row_losses = row_losses

    def __call__(
        self,
        outputs: Mapping[str, torch.Tensor],
        *,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        weights: torch.Tensor | Weigh | None = None,
        image_key: torch.Tensor | None = None,
        caption_key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of one batch of `b` pairs per rank, equally many on every rank.

        Args:
            outputs: Outputs of the model: `image_embeds` and `text_embeds` `(b, D)` of unit length. On one rank,
                `logits_per_text` `(b, b)` is enough.
            scale: Factor from cosines to logits, a scalar with gradient; required unless the model's own logits are
                used.
            bias: Summand of the logits, a scalar with gradient; None for 0.
            weights: Factors of the per-pair losses, `(b,)`, or a function that makes them from the losses.
            image_key: Image of each pair, int64 `(b,)`; required with `mask_false_negatives`.
            caption_key: Caption of each pair, int64 `(b,)`; required with `mask_false_negatives`.

        Returns:
            A scalar with gradient.

        Raises:
            ValueError: If `scale` is required and missing, or the keys are, with `mask_false_negatives`.
        """
        keys = None
        if self.mask_false_negatives:
            if image_key is None or caption_key is None:
                raise ValueError(
                    "mask_false_negatives needs image_key and caption_key in the batch, int64 (b,), equal where pairs "
                    "share them; return them from your data_collator, or leave mask_false_negatives out."
                )
            keys = torch.stack([image_key, caption_key])
        if get_rank_and_world_size()[1] == 1 and "logits_per_text" in outputs:
            mask = None if keys is None else find_false_negatives(keys, keys)
            logits = outputs["logits_per_text"]
            losses = per_pair_loss(logits, kind=self.kind, mask=mask, row_losses=self.row_losses)
            return _weighted_mean(losses, weights, _own_losses(losses, logits.diagonal(), self.kind), keys, keys)
        if scale is None:
            raise ValueError(
                "scale is missing: it is required on several ranks, and for a model that returns no logits."
            )
        bias = torch.zeros_like(scale) if bias is None else bias
        text_embeds, image_embeds = (promote_to_float32(outputs[name]) for name in ("text_embeds", "image_embeds"))
        with torch.autocast(text_embeds.device.type, enabled=False):
            all_keys = None if keys is None else gather_last_dimension(keys)
            if self.kind == "sigmoid":
                if callable(weights):
                    logits = (text_embeds * image_embeds).sum(-1) * scale + bias
                    weights = weights(_own_losses(logits, logits, self.kind), count_pairs(logits, keys, all_keys))
                return sigmoid_ring_loss(text_embeds, image_embeds, scale, bias, weights, keys, self.max_logits)
            directions = [
                self._softmax(rows, gather_with_grad(columns), scale, bias, keys, all_keys)
                for rows, columns in ((text_embeds, image_embeds), (image_embeds, text_embeds))
            ]
        losses = (directions[0] + directions[1]) / 2
        return _weighted_mean(losses, weights, _own_losses(losses, losses, self.kind), keys, all_keys)

    def _softmax(
        self,
        embeds: torch.Tensor,
        all_embeds: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        keys: torch.Tensor | None,
        all_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the losses `(b,)` of the rank's own rows in one direction."""
        offset = get_rank_and_world_size()[0] * len(embeds)

        def losses_of(rows: slice) -> torch.Tensor:
            mask = None
            if keys is not None and all_keys is not None:
                mask = find_false_negatives(keys[:, rows], all_keys)
            return self.row_losses(compute_logits(embeds[rows], all_embeds, scale, bias), offset + rows.start, mask)

        return compute_losses_in_blocks(losses_of, len(embeds), len(all_embeds), self.max_logits)


def per_pair_loss(
    logits: torch.Tensor,
    *,
    kind: str = "softmax",
    mask: torch.Tensor | None = None,
    row_losses: RowLosses = softmax_losses,
) -> torch.Tensor:
    """Compute the contrastive loss of each pair in one batch.

    Args:
        logits: Logits `(b, b)`, rows texts, columns images, true pairs on the diagonal.
        kind: `"softmax"` or `"sigmoid"`.
        mask: Symmetric bool `(b, b)`, True for two different pairs that must not be each other's negatives.
        row_losses: Loss of rows of logits in place of the cross-entropy, for softmax.

    Returns:
        Losses `(b,)`: the mean of the two directions' cross-entropies (softmax), or the sum over the row (sigmoid);
        `(b, 2)` where `row_losses` has two.
    """
    if kind == "sigmoid":
        return sigmoid_losses(logits, 0, mask)
    return (row_losses(logits, 0, mask) + row_losses(logits.t(), 0, mask)) / 2


def count_pairs(losses: torch.Tensor, keys: torch.Tensor | None, all_keys: torch.Tensor | None) -> torch.Tensor:
    """Count the pairs of all ranks that each own pair is compared with, itself included.

    Args:
        losses: Losses of the own pairs `(b,)`.
        keys: Image and caption of the own pairs, int64 `(2, b)`; None without a mask of false negatives.
        all_keys: Image and caption of the pairs of all ranks, int64 `(2, N)`; None without a mask.

    Returns:
        Counts, float `(b,)`.
    """
    if keys is None or all_keys is None:
        return torch.full_like(losses.detach(), len(losses) * get_rank_and_world_size()[1])
    rows = split_rows(keys.shape[1], all_keys.shape[1], MAX_LOGITS)
    same = [find_false_negatives(keys[:, part], all_keys).sum(1) for part in rows]
    return (all_keys.shape[1] - torch.cat(same) + 1).to(losses.dtype)


def _own_losses(losses: torch.Tensor, logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `-log q` of each pair from its loss in the batch and its own logit, without gradient."""
    if kind == "sigmoid":
        return -F.logsigmoid(promote_to_float32(logits.detach()))
    return losses.detach() if losses.dim() == 1 else losses[:, 1].detach()


def _weighted_mean(
    losses: torch.Tensor,
    weights: torch.Tensor | Weigh | None,
    own_losses: torch.Tensor,
    keys: torch.Tensor | None,
    all_keys: torch.Tensor | None,
) -> torch.Tensor:
    losses = losses if losses.dim() == 1 else losses[:, 0]
    if callable(weights):
        weights = weights(own_losses, count_pairs(losses, keys, all_keys))
    return losses.mean() if weights is None else (losses * weights.to(losses)).mean()
