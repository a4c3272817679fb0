"""The contrastive losses of CLIP and SigLIP, weighted per pair and with the negatives of all ranks."""

from collections.abc import Mapping

import torch

from hf_dissect.distributed import gather_last_dimension, gather_with_grad, rank_and_world_size
from hf_dissect.losses.logit_rows import (
    at_least_float32,
    false_negatives,
    logits_of,
    losses_in_blocks,
    sigmoid_rows,
    softmax_rows,
)
from hf_dissect.losses.sigmoid_ring import sigmoid_ring_loss

KINDS = ("softmax", "sigmoid")
MAX_LOGITS = 2**24  # 64 MiB in single precision: large enough to keep a GPU busy, and little beside a model


class ContrastiveLoss:
    """Mean over the pairs of `weight * loss`, with the pairs of all ranks as negatives of each other.

    On one rank the model's own logits, if there are any, are used as they are, so that the plain case is the plain
    computation. Otherwise the logits are made of the embeddings, in at least single precision, and each rank computes
    the rows of its own pairs only: the mean over ranks, which DDP takes of the gradients, is then the loss of the
    union of the batches. Logits beyond `max_logits` are computed in blocks of rows, none of which is kept.

    - softmax: the embeddings of all ranks are gathered with gradient (the local form of open_clip); more than one
      block is computed again in the backward pass.
    - sigmoid: the images go round a ring of ranks, see `sigmoid_ring_loss`.

    Args:
        kind: "softmax" (CLIP, arXiv 2103.00020, figure 3) or "sigmoid" (SigLIP, arXiv 2303.15343, equation 1).
        mask_false_negatives: pairs that share an image or an identical caption are not each other's negatives.
        max_logits: most logits of a block; a block has at least one row.

    Raises:
        ValueError: `kind` is neither.
    """

    def __init__(self, kind: str = "softmax", mask_false_negatives: bool = False, max_logits: int = MAX_LOGITS):
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: the contrastive loss is one of {', '.join(KINDS)}.")
        self.kind = kind
        self.mask_false_negatives = mask_false_negatives
        self.max_logits = max_logits

    def __call__(
        self,
        outputs: Mapping[str, torch.Tensor],
        *,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        image_key: torch.Tensor | None = None,
        caption_key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of one batch of `b` pairs per rank, equally many on every rank.

        Args:
            outputs: of the model, with `image_embeds` and `text_embeds` `(b, D)`, of unit length, and, or on one rank
                instead, `logits_per_text` `(b, b)`.
            scale, bias: factor and summand that make logits of cosines, with gradient; needed where those of the
                model are not used. No bias is a bias of 0.
            weights: `(b,)` factors of the per-pair losses.
            image_key, caption_key: int64 `(b,)`, equal where the image or the caption is the same; needed when
                `mask_false_negatives`.

        Returns:
            A scalar with gradient.

        Raises:
            ValueError: `scale` is needed and missing.
        """
        keys = torch.stack([image_key, caption_key]) if self.mask_false_negatives else None
        if rank_and_world_size()[1] == 1 and "logits_per_text" in outputs:
            mask = None if keys is None else false_negatives(keys, keys)
            return _weighted_mean(per_pair_loss(outputs["logits_per_text"], kind=self.kind, mask=mask), weights)
        if scale is None:
            raise ValueError("scale is missing: without the model's logits, or on several ranks, it has to be given.")
        bias = torch.zeros_like(scale) if bias is None else bias
        text_embeds, image_embeds = (at_least_float32(outputs[name]) for name in ("text_embeds", "image_embeds"))
        with torch.autocast(text_embeds.device.type, enabled=False):
            if self.kind == "sigmoid":
                return sigmoid_ring_loss(text_embeds, image_embeds, scale, bias, weights, keys, self.max_logits)
            all_keys = None if keys is None else gather_last_dimension(keys)
            losses = [
                self._softmax(rows, gather_with_grad(columns), scale, bias, keys, all_keys)
                for rows, columns in ((text_embeds, image_embeds), (image_embeds, text_embeds))
            ]
        return _weighted_mean(sum(losses) / 2, weights)

    def _softmax(self, embeds, all_embeds, scale, bias, keys, all_keys) -> torch.Tensor:
        """The losses `(b,)` of the rank's own rows in one direction."""
        offset = rank_and_world_size()[0] * len(embeds)

        def losses_of(rows: slice) -> torch.Tensor:
            mask = None if keys is None else false_negatives(keys[:, rows], all_keys)
            return softmax_rows(logits_of(embeds[rows], all_embeds, scale, bias), offset + rows.start, mask)

        return losses_in_blocks(losses_of, len(embeds), len(all_embeds), self.max_logits)


def per_pair_loss(logits: torch.Tensor, *, kind: str = "softmax", mask: torch.Tensor | None = None) -> torch.Tensor:
    """Contrastive loss of each pair in one batch.

    Args:
        logits: `(b, b)`, rows texts, columns images, true pairs on the diagonal.
        kind: "softmax" or "sigmoid".
        mask: bool `(b, b)`, True where two different pairs must not be each other's negatives (symmetric).

    Returns:
        `(b,)`: softmax: mean of the two directions' cross-entropies; sigmoid: sum over the row.
    """
    if kind == "sigmoid":
        return sigmoid_rows(logits, 0, mask)
    return (softmax_rows(logits, 0, mask) + softmax_rows(logits.t(), 0, mask)) / 2


def _weighted_mean(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return losses.mean() if weights is None else (losses * weights.to(losses)).mean()
