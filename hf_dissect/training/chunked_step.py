"""Training step in chunks of pairs, whose loss is that of the whole batch."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.losses import grad_cached_backward
from hf_dissect.models.tasks import select_representations


def step_in_chunks(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    compute_loss: Callable[..., torch.Tensor],
    *,
    chunk_size: int,
    optimizer: Any,
    accelerator: Accelerator,
    num_micro_batches: int,
    autocast: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """Compute loss and gradients of a micro-batch by GradCache, see `grad_cached_backward`.

    Args:
        model: Dual encoder, wrapped or not.
        inputs: Batch of `k` pairs on the device of the model.
        compute_loss: Function from model, batch, outputs, scale, bias and projections of a router to the loss.
        chunk_size: Pairs that go through the model at a time.
        optimizer: Optimiser, which may have a training mode of its own.
        accelerator: Accelerator of the run.
        num_micro_batches: Number of micro-batches of the optimiser step, which share its gradient.
        autocast: Function that returns the context of mixed precision.

    Returns:
        Loss `()` without gradient, divided by the number of micro-batches.
    """
    model.train()
    if callable(switch_mode := getattr(optimizer, "train", None)):
        switch_mode()
    share = 1 / num_micro_batches
    loss = grad_cached_backward(
        model,
        forward_inputs(model, inputs),
        lambda cached, scale, bias: compute_loss(model, inputs, cached, scale, bias, cached["projections"]),
        chunk_size=chunk_size,
        backward=lambda part: accelerator.backward(part * share),
        no_sync=partial(accelerator.no_sync, model),
        autocast=autocast,
        representations=partial(select_representations, model),
    )
    return loss * share
