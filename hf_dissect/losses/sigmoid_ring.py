"""The sigmoid loss over the pairs of all ranks, without more images on a rank than its own and those of one other."""

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from hf_dissect.distributed import get_rank_and_world_size, pass_to_next_rank
from hf_dissect.losses.logit_rows import compute_logits, find_false_negatives, sigmoid_losses, split_rows


def sigmoid_ring_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
    keys: torch.Tensor | None,
    max_logits: int,
) -> torch.Tensor:
    """Compute the weighted mean, over the rank's own texts, of the sigmoid loss against the images of all ranks.

    The images travel around a ring of ranks (arXiv 2303.15343, section 3.3). Their gradient travels with them, and
    each rank adds its part. Nothing has to be kept, or sent again, for the backward pass, which only multiplies.

    Args:
        text_embeds: Embeddings `(b, D)`, in at least single precision; equally many on every rank.
        image_embeds: Embeddings `(b, D)`, in at least single precision.
        scale: Factor of the cosines, a scalar.
        bias: Summand of the logits, a scalar.
        weights: Factors of the losses, `(b,)`, without gradient; None for 1.
        keys: Image and caption of each pair, int64 `(2, b)`; pairs that share one are not each other's negatives. None
            for no mask.
        max_logits: Largest number of logits held at a time, unless one row has more.

    Returns:
        A scalar with gradient. It must enter the objectives of all ranks by the same factor.
    """
    return _SigmoidRing.apply(text_embeds, image_embeds, scale, bias, weights, keys, max_logits)


class _SigmoidRing(torch.autograd.Function):
    """The ring as an autograd function, which computes the gradients in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        texts: torch.Tensor,
        images: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        weights: torch.Tensor | None,
        keys: torch.Tensor | None,
        max_logits: int,
    ) -> torch.Tensor:
        """Compute the loss and save its gradients; arguments as in `sigmoid_ring_loss`."""
        weights = texts.new_ones(len(texts)) if weights is None else weights.to(texts)
        loss = texts.new_zeros(())
        gradients = [torch.zeros_like(tensor) for tensor in (texts, images, scale, bias)]
        their_images, their_keys = images.detach(), keys
        world_size = get_rank_and_world_size()[1]
        for hop in range(world_size):
            for rows in split_rows(len(texts), len(images), max_logits):
                mask = None if keys is None else find_false_negatives(keys[:, rows], cast(torch.Tensor, their_keys))
                leaves = [tensor.detach().requires_grad_() for tensor in (texts[rows], their_images, scale, bias)]
                with torch.enable_grad():
                    losses = sigmoid_losses(compute_logits(*leaves), rows.start if hop == 0 else None, mask)
                    part = (losses * weights[rows]).sum() / len(texts)
                sums = (gradients[0][rows], *gradients[1:])
                for total, gradient in zip(sums, torch.autograd.grad(part, leaves), strict=True):
                    total += gradient
                loss += part.detach()
            if hop == world_size - 1:  # the gradient alone returns to the rank of its images
                (gradients[1],) = pass_to_next_rank([gradients[1]])
            elif keys is None:
                gradients[1], their_images = pass_to_next_rank([gradients[1], their_images])
            else:
                gradients[1], their_images, their_keys = pass_to_next_rank(
                    [gradients[1], their_images, cast(torch.Tensor, their_keys)]
                )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the saved gradients by the incoming one."""
        return *(own * gradient.to(own) for own in ctx.saved_tensors), None, None, None
