"""Contrastive batches beyond memory: the gradient of the whole batch's loss, computed a chunk of pairs at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.models.families import logit_scale_and_bias

Context = Callable[[], AbstractContextManager]
LossOf = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def embeddings(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the representations of a contrastive loss, `image_embeds` and `text_embeds` `(c, D)`."""
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
    """Add the gradients of a loss over `k` pairs to the model's parameters, one chunk of activations at a time.

    GradCache (arXiv 2101.06983, section 3.2) works in three steps. The chunks go through the model without gradient;
    the loss of all representations gives the gradient of each of them; and the chunks go through the model again,
    where these gradients start the backward pass. The result is the gradient of the whole batch, at the cost of one
    more forward pass. A chunk sees the same random numbers both times, but not those that one pass over the batch
    would draw. Buffers such as batch-norm statistics move once per chunk, and batch norm in training mode normalises
    over the chunk instead of the batch.

    Args:
        model: Dual encoder in training mode, wrapped or not, whose loss is a function of its representations, scale
            and bias. It is called as a whole.
        inputs: Keyword arguments of the model, each with leading dimension `k`, on the model's device.
        loss_of: Function of the representations of all `k` pairs, the scale and the bias, all in at least single
            precision, which returns the loss. It is called once, and may exchange tensors between ranks.
        chunk_size: Largest number of pairs in a forward pass. Chunks differ by at most one pair; with a single chunk
            the step is a plain one.
        backward: Replacement for `Tensor.backward`, which scales (GradScaler, `Accelerator.backward`) or divides by
            the accumulation steps. It must be linear. Each chunk calls it with a scalar that has the gradient of the
            loss, but not its value.
        no_sync: Context of all chunks but the last, in which DDP must not exchange gradients.
        autocast: Context of mixed precision for the forward passes. The caller must be outside of any such context,
            which would cache weights that were cast without gradient.
        representations: Function from the model's outputs to the inputs of the loss: tensors `(c, ...)` of a chunk, in
            a nest of dicts, lists and tuples.

    Returns:
        The loss, a scalar without gradient.

    Raises:
        ValueError: If `chunk_size` is less than 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1 pair.")
    num_pairs = len(next(iter(inputs.values())))

    def encode(rows: slice) -> Any:
        with autocast():
            return representations(model(**{name: value[rows] for name, value in inputs.items()}))

    if num_pairs <= chunk_size:
        loss = loss_of(tree_map(promote_to_float32, encode(slice(None))), *logit_scale_and_bias(model))
        backward(loss)
        return loss.detach()

    chunks = _split_chunks(num_pairs, chunk_size)
    random_states: list[_RandomState] = []
    cached: list[Any] = []
    with torch.no_grad(), _preserve_buffers(model):
        for rows in chunks:
            random_states.append(_RandomState(model))
            cached.append(tree_map(promote_to_float32, encode(rows)))
    loss, gradients, scalar_gradients = _compute_loss_and_gradients(model, cached, loss_of)
    for rows, random_state in zip(chunks, random_states, strict=True):
        is_last = rows is chunks[-1]
        with nullcontext() if is_last else no_sync():
            random_state.restore()
            surrogate = _build_surrogate(tree_leaves(encode(rows)), [gradient[rows] for gradient in gradients])
            if is_last:
                surrogate = surrogate + _build_surrogate(logit_scale_and_bias(model), scalar_gradients)
            if surrogate.requires_grad:
                backward(surrogate)
    return loss


def _split_chunks(num_pairs: int, chunk_size: int) -> list[slice]:
    num_chunks = -(-num_pairs // chunk_size)
    bounds = [num_pairs * i // num_chunks for i in range(num_chunks + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _compute_loss_and_gradients(
    model: nn.Module, cached: list[Any], loss_of: LossOf
) -> tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Return the loss, its gradients by the representations of all pairs `(k, ...)`, and those by scale and bias."""
    whole = tree_map(lambda *parts: torch.cat(parts).requires_grad_(), *cached)
    scalars = [scalar.detach().requires_grad_() for scalar in logit_scale_and_bias(model)]
    loss = loss_of(whole, *scalars)
    leaves = tree_leaves(whole) + scalars
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients[:-2], gradients[-2:]


def _build_surrogate(tensors: Iterable[torch.Tensor], gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return a scalar whose gradients by `tensors` are `gradients`."""
    products = ((tensor.to(gradient) * gradient).sum() for tensor, gradient in zip(tensors, gradients, strict=True))
    return cast(torch.Tensor, sum(products))


class _RandomState:
    """The random states that a forward pass of a model draws from.

    Args:
        model: Model whose parameters name the devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {
            parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")
        }
        self._devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set the random states to those at the time of construction."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers, such as batch-norm statistics, at the end of the context."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
