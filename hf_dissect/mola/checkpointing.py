"""Support for gradient checkpointing, which runs layers a second time during the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def get_checkpointing_mode(module: nn.Module) -> str | None:
    """Return the kind of gradient checkpointing that transformers applies to a module.

    Args:
        module: A model or a part of it.

    Returns:
        `"reentrant"`, `"not reentrant"`, or None if gradient checkpointing is off.
    """
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False):
            function = getattr(part, "_gradient_checkpointing_func", None)
            return "reentrant" if getattr(function, "keywords", {}).get("use_reentrant", True) else "not reentrant"
    return None


class Carrier(torch.autograd.Function):
    """The identity on a tensor whose backward pass hands the routing weights the gradient of their leaf.

    Each reentrant checkpoint runs a backward pass of its own, which would go through the router again. The
    checkpointed blocks therefore see a leaf that collects their gradients. The carried tensor is the input of the
    model, so it is reached last on the way back, when the leaf has collected everything. The leaf is passed inside a
    list: if it were a direct input, autograd would run this function before the gradients of layers outside the
    checkpoints arrive.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weights: torch.Tensor, leaf: list[torch.Tensor]) -> torch.Tensor:
        """Return a view of the tensor and remember the leaf.

        Args:
            ctx: Context of autograd.
            tensor: Input of the model, any shape.
            weights: Routing weights with gradient, `(B, E)`.
            leaf: List that holds the detached routing weights, `(B, E)`.
        """
        ctx.leaf = leaf[0]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the incoming gradient for the tensor and the gradient of the leaf for the weights."""
        collected, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, collected, None
