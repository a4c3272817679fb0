"""Makes sure that the task ids of a batch are what the experts can be chosen by."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_task_ids(task_ids: torch.Tensor, tensors: list[torch.Tensor], num_experts: Mapping[str, int]) -> int | None:
    """The one task of all samples; None when there are several.

    Args:
        task_ids: int64 `(B,)`.
        tensors: the other inputs of the model, the first with `B` samples.
        num_experts: adapter -> number of its tasks.

    Raises:
        TypeError, ValueError: wrong type, shape, device or range.
    """
    if not torch.is_tensor(task_ids) or task_ids.dtype != torch.int64:
        found = f"{task_ids.dtype} tensor" if torch.is_tensor(task_ids) else type(task_ids).__name__
        raise TypeError(f"task_ids is a {found}; it must be an int64 tensor of shape (B,).")
    batch_size = len(tensors[0]) if tensors and tensors[0].dim() else None
    if task_ids.dim() != 1 or (batch_size is not None and len(task_ids) != batch_size) or not len(task_ids):
        raise ValueError(
            f"task_ids has shape {tuple(task_ids.shape)}; it must have one task for each of the {batch_size or 'B'} "
            "samples."
        )
    if tensors and task_ids.device != tensors[0].device:
        raise ValueError(
            f"task_ids are on {task_ids.device}, the other inputs on {tensors[0].device}; move them there."
        )
    lowest, highest = torch.stack(task_ids.aminmax()).tolist()
    for adapter_name, number in num_experts.items():
        if lowest < 0 or highest >= number:
            raise ValueError(
                f"task_ids from {lowest} to {highest}: adapter {adapter_name!r} has the tasks 0 to {number - 1}."
            )
    return lowest if lowest == highest else None
