"""The contrastive losses of CLIP and SigLIP, weighted per pair and with the negatives of all ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

KINDS = ("softmax", "sigmoid")


class ContrastiveLoss:
    """Mean over the pairs of `weight * loss`, with the pairs of all ranks as negatives of each other.

    On one rank the model's own logits are used as they are, so that the plain case is the plain computation. On
    several ranks the embeddings are gathered with gradient and each rank computes its own rows only (the local form of
    open_clip): the mean over ranks, which DDP takes of the gradients, is then the loss of the union of the batches.

    Args:
        kind: "softmax" (CLIP, arXiv 2103.00020, figure 3) or "sigmoid" (SigLIP, arXiv 2303.15343, equation 1).
        mask_false_negatives: pairs that share an image or an identical caption are not each other's negatives.

    Raises:
        ValueError: `kind` is neither.
    """

    def __init__(self, kind: str = "softmax", mask_false_negatives: bool = False):
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: the contrastive loss is one of {', '.join(KINDS)}.")
        self.kind = kind
        self.mask_false_negatives = mask_false_negatives

    def __call__(
        self,
        outputs,
        *,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        image_key: torch.Tensor | None = None,
        caption_key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of one batch of `b` pairs per rank.

        Args:
            outputs: of the model, with `logits_per_text` `(b, b)`, `image_embeds` and `text_embeds` `(b, D)`.
            scale, bias: factor and summand that make logits of cosines, with gradient; needed on several ranks.
            weights: `(b,)` factors of the per-pair losses.
            image_key, caption_key: int64 `(b,)`, equal where the image or the caption is the same; needed when
                `mask_false_negatives`.

        Returns:
            A scalar with gradient.
        """
        keys = torch.stack([image_key, caption_key]) if self.mask_false_negatives else None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            losses = self._gathered(outputs, keys, scale, 0.0 if bias is None else bias)
        else:
            mask = None if keys is None else false_negatives(keys, keys)
            losses = per_pair_loss(outputs["logits_per_text"], kind=self.kind, mask=mask)
        return losses.mean() if weights is None else (losses * weights.to(losses)).mean()

    def _gathered(self, outputs, keys: torch.Tensor | None, scale, bias) -> torch.Tensor:
        image_embeds, text_embeds = outputs["image_embeds"], outputs["text_embeds"]
        all_image_embeds, all_text_embeds = gather_with_grad(image_embeds), gather_with_grad(text_embeds)
        mask = None if keys is None else false_negatives(keys, gather_columns(keys))
        offset = dist.get_rank() * len(image_embeds)
        per_text = text_embeds @ all_image_embeds.T * scale + bias
        if self.kind == "sigmoid":
            return _sigmoid_rows(per_text, offset, mask)
        per_image = image_embeds @ all_text_embeds.T * scale
        return (_softmax_rows(per_text, offset, mask) + _softmax_rows(per_image, offset, mask)) / 2


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
        return _sigmoid_rows(logits, 0, mask)
    return (_softmax_rows(logits, 0, mask) + _softmax_rows(logits.t(), 0, mask)) / 2


def _softmax_rows(logits: torch.Tensor, offset: int, mask: torch.Tensor | None) -> torch.Tensor:
    labels = torch.arange(len(logits), device=logits.device) + offset
    if mask is not None:
        logits = logits.masked_fill(_off_diagonal(mask, labels), -torch.inf)
    return F.cross_entropy(_at_least_float32(logits), labels, reduction="none")


def _sigmoid_rows(logits: torch.Tensor, offset: int, mask: torch.Tensor | None) -> torch.Tensor:
    logits = _at_least_float32(logits)
    labels = torch.arange(len(logits), device=logits.device) + offset
    sign = -torch.ones_like(logits)
    sign[torch.arange(len(logits), device=logits.device), labels] = 1
    log_likelihood = F.logsigmoid(sign * logits)
    if mask is not None:
        log_likelihood = log_likelihood.masked_fill(_off_diagonal(mask, labels), 0)
    return -log_likelihood.sum(-1)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _off_diagonal(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return mask.scatter(1, labels[:, None], False)


def false_negatives(keys: torch.Tensor, other_keys: torch.Tensor) -> torch.Tensor:
    """Which pairs share an image or a caption: bool `(b, N)` from keys `(2, b)` and `(2, N)`, true pairs included."""
    return (keys[:, :, None] == other_keys[:, None, :]).any(0)


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate `(b, D)` of all ranks to `(b * world size, D)`; the gradient flows back to every rank's own rows."""
    return _GatherWithGrad.apply(tensor)


def gather_columns(keys: torch.Tensor) -> torch.Tensor:
    """Concatenate `(n, b)` of all ranks to `(n, b * world size)`, without gradient."""
    parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts, dim=1)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
