"""The task-wise decorrelation loss, which routes samples of one task alike and samples of other tasks differently."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def decorrelation_loss(embeddings: torch.Tensor, task_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute the supervised contrastive loss with the task as class (MoLA, ICML 2024, arXiv 2406.09679).

    The loss is the mean, over the ordered pairs `i != j` of equal task, of
    `-log(exp(z_i.z_j / temperature) / sum_{k != i} exp(z_i.z_k / temperature))`, where `z` are the embeddings scaled
    to unit length. With several processes, the pairs of all of them count. Each process then returns the part of its
    own rows, times the number of processes, so that the mean over processes, which DDP takes of the gradients, is the
    loss of the union of the batches.

    Args:
        embeddings: Embeddings of any length, `(b, d)`; equally many on every process.
        task_ids: Integers `(b,)` on the same device.
        temperature: Divisor of the cosines.

    Returns:
        A scalar with gradient, in at least single precision; 0 if no two samples have the same task.

    Raises:
        ValueError: If the shapes do not match.
    """
    if embeddings.dim() != 2 or task_ids.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)} and task_ids of shape {tuple(task_ids.shape)}: must be "
            "(b, d) and (b,)."
        )
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    embeddings = F.normalize(embeddings, dim=-1)
    offset, world_size, everyone, all_tasks = 0, 1, embeddings, task_ids
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        world_size, offset = dist.get_world_size(), dist.get_rank() * len(embeddings)
        everyone, all_tasks = _AllGather.apply(embeddings), _all_gather(task_ids)
    if len(everyone) == 1:
        return embeddings.sum() * 0
    itself = torch.arange(len(embeddings), device=embeddings.device) + offset
    similarity = embeddings @ everyone.T / temperature
    log_probability = similarity - similarity.scatter(1, itself[:, None], -torch.inf).logsumexp(1, keepdim=True)
    same_task = (task_ids[:, None] == all_tasks[None, :]).scatter(1, itself[:, None], False)
    counts = torch.bincount(torch.unique(all_tasks, return_inverse=True)[1])
    num_pairs = (counts * (counts - 1)).sum().clamp_min(1)
    return -torch.where(same_task, log_probability, 0.0).sum() * world_size / num_pairs


def _all_gather(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    """The rows of all processes.

    The backward pass sums the gradient of each row over the processes and returns it to the owner of the row.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Gather `(b, d)` from every process into `(N, d)`."""
        ctx.rows = len(tensor)
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this process's rows, `(b, d)`."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
