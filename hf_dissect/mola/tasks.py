"""Validation of the task ids of a batch, before experts are chosen by them."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_task_ids(task_ids: torch.Tensor, size: int | None, device: torch.device | None) -> None:
    """Check the form of the task ids of a batch.

    Args:
        task_ids: Task of each sample, int64 `(B,)`.
        size: Number of samples; None if it is not known.
        device: Device of the other inputs; None without any.

    Raises:
        TypeError: If `task_ids` is not an int64 tensor.
        ValueError: If its shape or device is wrong.
    """
    if not torch.is_tensor(task_ids) or task_ids.dtype != torch.int64:
        kind = f"{task_ids.dtype} tensor" if torch.is_tensor(task_ids) else type(task_ids).__name__
        raise TypeError(f"task_ids is a {kind}; it must be an int64 tensor of shape (B,).")
    if task_ids.dim() != 1 or (size is not None and len(task_ids) != size) or not len(task_ids):
        raise ValueError(
            f"task_ids has shape {tuple(task_ids.shape)}; it must have one task for each of the {size or 'B'} samples."
        )
    if device is not None and task_ids.device != device:
        raise ValueError(f"task_ids are on {task_ids.device}, the other inputs on {device}; move them to one device.")


def find_common_task(task_ids: torch.Tensor, num_experts: Mapping[str, int]) -> int | None:
    """Return the task that all samples share, after a check that each adapter has an expert for every task.

    Args:
        task_ids: Task of each sample, int64 `(B,)`.
        num_experts: Number of tasks of each grad adapter, by name.

    Returns:
        The common task; None if there are several, or in a compiled model, which does not wait for their values.

    Raises:
        ValueError: If an adapter has no expert for a task.
    """
    if not num_experts:
        return None
    if torch.compiler.is_compiling():
        in_range = (task_ids >= 0) & (task_ids < min(num_experts.values()))
        torch._assert_async(in_range.all(), "task_ids has a task without an expert")
        return None
    lowest, highest = torch.stack(task_ids.aminmax()).tolist()
    for adapter_name, number in num_experts.items():
        if lowest < 0 or highest >= number:
            raise ValueError(
                f"task_ids from {lowest} to {highest}: adapter {adapter_name!r} has the tasks 0 to {number - 1}."
            )
    return lowest if lowest == highest else None
