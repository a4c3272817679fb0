"""Validation of the task ids of a batch, before experts are chosen by them."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_task_ids(task_ids: torch.Tensor, tensors: list[torch.Tensor], num_experts: Mapping[str, int]) -> int | None:
    """Check the task ids of a batch, and return the task if all samples share one.

    Args:
        task_ids: Task of each sample, int64 `(B,)`.
        tensors: Other inputs of the model; the first has `B` rows.
        num_experts: Number of tasks of each adapter, by name.

    Returns:
        The common task of all samples, or None if there are several.

    Raises:
        TypeError: If `task_ids` is not an int64 tensor.
        ValueError: If its shape, device or range is wrong.
    """
    if not torch.is_tensor(task_ids) or task_ids.dtype != torch.int64:
        kind = f"{task_ids.dtype} tensor" if torch.is_tensor(task_ids) else type(task_ids).__name__
        raise TypeError(f"task_ids is a {kind}; it must be an int64 tensor of shape (B,).")
    batch_size = len(tensors[0]) if tensors and tensors[0].dim() else None
    if task_ids.dim() != 1 or (batch_size is not None and len(task_ids) != batch_size) or not len(task_ids):
        raise ValueError(
            f"task_ids has shape {tuple(task_ids.shape)}; it must have one task for each of the {batch_size or 'B'} "
            "samples."
        )
    if tensors and task_ids.device != tensors[0].device:
        raise ValueError(
            f"task_ids are on {task_ids.device}, the other inputs on {tensors[0].device}; move them to one device."
        )
    lowest, highest = torch.stack(task_ids.aminmax()).tolist()
    for adapter_name, number in num_experts.items():
        if lowest < 0 or highest >= number:
            raise ValueError(
                f"task_ids from {lowest} to {highest}: adapter {adapter_name!r} has the tasks 0 to {number - 1}."
            )
    return lowest if lowest == highest else None
