"""What routing has to do where gradient checkpointing runs layers a second time, in the backward pass."""

from __future__ import annotations

import torch
from torch import nn


def checkpointing_mode(module: nn.Module) -> str | None:
    """ "reentrant", "not reentrant", or None when transformers' gradient checkpointing is off."""
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False):
            function = getattr(part, "_gradient_checkpointing_func", None)
            return "reentrant" if getattr(function, "keywords", {}).get("use_reentrant", True) else "not reentrant"
    return None


class Carrier(torch.autograd.Function):
    """Passes a tensor through, and in the backward pass hands the routing weights the gradient found on their leaf.

    Reentrant checkpoints run a backward pass of their own for each block, and would each go through the router. The
    blocks see a leaf instead, which collects their gradients; as the input of the model was made before anything else,
    it is the last to be reached on the way back. The leaf comes in a list: as an input of its own it would wait for
    this function before it took the gradients of layers outside the checkpoints.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, weights: torch.Tensor, leaf: list[torch.Tensor]) -> torch.Tensor:
        ctx.leaf = leaf[0]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        collected, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, collected, None
