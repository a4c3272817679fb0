"""The sigmoid loss over the pairs of all ranks while no rank ever holds more images than its own and one rank's."""

import torch
from torch.autograd.function import once_differentiable

from hf_dissect.distributed import pass_to_next_rank, rank_and_world_size
from hf_dissect.losses.logit_rows import false_negatives, logits_of, row_blocks, sigmoid_rows


def sigmoid_ring_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
    keys: torch.Tensor | None,
    max_logits: int,
) -> torch.Tensor:
    """Weighted mean, over the rank's own texts, of the sigmoid loss against the images of all ranks.

    The images go round a ring of ranks (arXiv 2303.15343, section 3.3). With them goes their gradient, to which each
    rank adds its part, so that nothing has to be kept, or sent again, for the backward pass: that only multiplies.

    Args:
        text_embeds, image_embeds: `(b, D)`, in at least single precision; equally many on every rank.
        scale, bias: scalars.
        weights: `(b,)`, without gradient, or None.
        keys: int64 `(2, b)`: pairs that share one are not each other's negatives; None for no such mask.
        max_logits: most logits held at a time, as far as one row has no more.

    Returns:
        A scalar with gradient. It must enter the ranks' objectives by the same factor.
    """
    return _SigmoidRing.apply(text_embeds, image_embeds, scale, bias, weights, keys, max_logits)


class _SigmoidRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, texts, images, scale, bias, weights, keys, max_logits) -> torch.Tensor:
        weights = texts.new_ones(len(texts)) if weights is None else weights.to(texts)
        loss = texts.new_zeros(())
        gradients = [torch.zeros_like(tensor) for tensor in (texts, images, scale, bias)]
        their_images, their_keys = images.detach(), keys
        world_size = rank_and_world_size()[1]
        for hop in range(world_size):
            for rows in row_blocks(len(texts), len(images), max_logits):
                mask = None if keys is None else false_negatives(keys[:, rows], their_keys)
                leaves = [tensor.detach().requires_grad_() for tensor in (texts[rows], their_images, scale, bias)]
                with torch.enable_grad():
                    losses = sigmoid_rows(logits_of(*leaves), rows.start if hop == 0 else None, mask)
                    part = (losses * weights[rows]).sum() / len(texts)
                sums = (gradients[0][rows], *gradients[1:])
                for total, gradient in zip(sums, torch.autograd.grad(part, leaves), strict=True):
                    total += gradient
                loss += part.detach()
            if hop == world_size - 1:  # at the last hop the gradient alone goes on, to where its images are at home
                (gradients[1],) = pass_to_next_rank([gradients[1]])
            elif keys is None:
                gradients[1], their_images = pass_to_next_rank([gradients[1], their_images])
            else:
                gradients[1], their_images, their_keys = pass_to_next_rank([gradients[1], their_images, their_keys])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        return *(own * gradient.to(own) for own in ctx.saved_tensors), None, None, None
