"""What ranks send each other for a loss over the pairs of all of them."""

import torch
import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and their number; `(0, 1)` where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate `(b, D)` of all ranks to `(b * world size, D)`; the gradient flows back to every rank's own rows."""
    return tensor if rank_and_world_size()[1] == 1 else _GatherWithGrad.apply(tensor)


def gather_columns(keys: torch.Tensor) -> torch.Tensor:
    """Concatenate `(n, b)` of all ranks to `(n, b * world size)`, without gradient."""
    return keys if rank_and_world_size()[1] == 1 else _gather(keys.T).T


def pass_on(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Send tensors to the next rank of the ring and return those of the previous one, of the same shapes and types."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return tensors
    received = [torch.empty_like(tensor) for tensor in tensors]
    operations = []
    for tag, (sent, place) in enumerate(zip(tensors, received, strict=True)):
        operations.append(dist.P2POp(dist.isend, sent.contiguous(), (rank + 1) % world_size, tag=tag))
        operations.append(dist.P2POp(dist.irecv, place, (rank - 1) % world_size, tag=tag))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    gathered = tensor.new_empty(len(tensor) * dist.get_world_size(), *tensor.shape[1:])
    dist.all_gather_single(gathered, tensor.contiguous())
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(tensor)
        return _gather(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own
