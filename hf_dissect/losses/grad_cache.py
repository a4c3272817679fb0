"""Contrastive batches far beyond memory: the gradient of the whole batch's loss, a chunk of pairs at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_dissect.losses.logit_rows import at_least_float32
from hf_dissect.models.families import logit_scale_and_bias

Context = Callable[[], AbstractContextManager]
LossOf = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def embeddings(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The representations that a contrastive loss is made of: `image_embeds` and `text_embeds` `(c, D)`."""
    return {name: outputs[name] for name in ("image_embeds", "text_embeds")}


def grad_cached_backward(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    loss_of: LossOf,
    *,
    chunk_size: int,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Context = nullcontext,
    autocast: Context = nullcontext,
    representations: Callable[[Mapping[str, torch.Tensor]], Any] = embeddings,
) -> torch.Tensor:
    """Add the gradients of a loss over `k` pairs to the model's parameters, with activations of one chunk at a time.

    GradCache (arXiv 2101.06983, section 3.2): the chunks go through the model without gradient, the loss of all
    representations gives the gradient of each of them, and the chunks go through the model again, where these
    gradients begin the backward pass. That costs one more forward pass, and gives the gradients of the whole batch:
    a chunk sees the same random numbers both times (though not those that one pass over the batch would draw), and
    buffers such as batch-norm statistics move once for each chunk. Batch norm in training mode normalises over the
    chunk instead of the batch.

    Args:
        model: a dual encoder in training mode, wrapped or not, whose loss is a function of its representations, scale
            and bias. It is called as a whole.
        inputs: keyword arguments of the model, each with leading dimension `k`, on the model's device.
        loss_of: called once with the representations of all `k` pairs, scale and bias, all in at least single
            precision; returns the loss. With several ranks it may exchange between them.
        chunk_size: most pairs in a forward pass. The chunks differ by one pair at most; a single one is a plain step.
        backward: in place of `Tensor.backward`, to scale (GradScaler, `Accelerator.backward`) and to divide by the
            accumulation steps. It is called for each chunk with a scalar whose gradient, not value, is the loss's, and
            must be linear.
        no_sync: context of all chunks but the last, in which DDP must not exchange gradients.
        autocast: context of mixed precision for the forward passes; the caller must be outside any such context, as it
            would keep weights that were cast without gradient.
        representations: what the loss needs of the model's outputs, tensors `(c, ...)` of a chunk, in a nest of
            dicts, lists and tuples.

    Returns:
        The loss, a scalar without gradient.

    Raises:
        ValueError: `chunk_size` is less than 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1 pair.")
    num_pairs = len(next(iter(inputs.values())))

    def encode(rows: slice) -> Any:
        with autocast():
            return representations(model(**{name: value[rows] for name, value in inputs.items()}))

    if num_pairs <= chunk_size:
        loss = loss_of(tree_map(at_least_float32, encode(slice(None))), *logit_scale_and_bias(model))
        backward(loss)
        return loss.detach()

    chunks, random_states, cached = _chunks(num_pairs, chunk_size), [], []
    with torch.no_grad(), _unmoved_buffers(model):
        for rows in chunks:
            random_states.append(_RandomState(model))
            cached.append(tree_map(at_least_float32, encode(rows)))
    loss, gradients, scalar_gradients = _loss_and_gradients(model, cached, loss_of)
    for rows, random_state in zip(chunks, random_states, strict=True):
        is_last = rows is chunks[-1]
        with nullcontext() if is_last else no_sync():
            random_state.restore()
            surrogate = _product(tree_leaves(encode(rows)), [gradient[rows] for gradient in gradients])
            if is_last:
                surrogate = surrogate + _product(logit_scale_and_bias(model), scalar_gradients)
            if surrogate.requires_grad:
                backward(surrogate)
    return loss


def _chunks(num_pairs: int, chunk_size: int) -> list[slice]:
    num_chunks = -(-num_pairs // chunk_size)
    bounds = [num_pairs * i // num_chunks for i in range(num_chunks + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _loss_and_gradients(model: nn.Module, cached: list[Any], loss_of: LossOf):
    """The loss, its gradients by the representations of all pairs `(k, ...)`, and those by scale and bias."""
    whole = tree_map(lambda *parts: torch.cat(parts).requires_grad_(), *cached)
    scalars = [scalar.detach().requires_grad_() for scalar in logit_scale_and_bias(model)]
    loss = loss_of(whole, *scalars)
    leaves = tree_leaves(whole) + scalars
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients[:-2], gradients[-2:]


def _product(tensors: Iterable[torch.Tensor], gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar whose gradients by `tensors` are `gradients`."""
    return sum((tensor.to(gradient) * gradient).sum() for tensor, gradient in zip(tensors, gradients, strict=True))


class _RandomState:
    """The random states that a forward pass of a model draws from."""

    def __init__(self, model: nn.Module):
        self._cpu = torch.get_rng_state()
        devices = {
            parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")
        }
        self._devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, such as batch-norm statistics, are afterwards as they were."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
