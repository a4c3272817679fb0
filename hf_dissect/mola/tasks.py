"""The tasks of a batch, by which grad adapters choose their experts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.passes import Pass, Passes


class TaskChoice:
    """The tasks of a model's adapters: those of a call, those that stand in for them, and those that are merged."""

    mola_config: dict[str, MolaConfig]
    fixed_task: dict[str, int]
    passes: Passes
    training: bool
    disable_adapters: bool
    active_adapters: list[str]
    _warned: set[str]

    def choose_tasks(self, new: Pass, task_ids: torch.Tensor | None) -> None:
        """Note the tasks of a pass that begins, by which grad adapters choose their experts.

        Args:
            new: Pass, of which `size` and `device` are known.
            task_ids: Tasks of the samples, int64 `(B,)`; None to use the fixed or default task.

        Raises:
            TypeError: If `task_ids` is not an int64 tensor.
            ValueError: If their shape, device or range is wrong, or they are missing in training.
        """
        num_experts = {
            name: config.num_experts for name, config in self._get_active_configs() if config.variant == "grad"
        }
        if task_ids is None:
            self._check_default_tasks(list(num_experts))
        else:
            check_task_ids(task_ids, new.size, new.device)
            new.task_ids, new.common_task = task_ids, find_common_task(task_ids, num_experts)

    def _check_default_tasks(self, names: list[str]) -> None:
        missing = next((name for name in names if self.get_default_task(name) is None), None)
        if missing is None:
            return
        if self.training:
            raise ValueError(
                f"task_ids are missing: adapter {missing!r} trains an expert per task. Call the model with "
                "task_ids=..., int64 (B,), or fix one task with set_task(task)."
            )
        self._warn_once(
            f"Adapter {missing!r} has an expert per task, but the model was called without task_ids: it takes the "
            "mean of the experts. Give task_ids, int64 (B,), or fix one task with set_task(task)."
        )

    def get_default_task(self, adapter_name: str) -> int | None:
        """Return the task of an adapter in calls without task ids; None for the mean of its experts."""
        return self.fixed_task.get(adapter_name, self.mola_config[adapter_name].default_task)

    def get_task_to_merge(self, adapter_name: str) -> int:
        """Return the task whose expert a merge adds to the base weights.

        Raises:
            ValueError: If the adapter has a router, or no task is fixed.
        """
        config = self.mola_config[adapter_name]
        if config.variant == "router":
            raise ValueError(
                f"Adapter {adapter_name!r} has a router: its weights depend on the input and cannot be merged."
            )
        task = self.get_default_task(adapter_name)
        if task is None:
            raise ValueError(
                f"Adapter {adapter_name!r} has an expert per task: choose the one to merge with `set_task(task)`, a "
                f"task from 0 to {config.num_experts - 1}."
            )
        return task

    def check_merged_task(self, merged: Mapping[str, int]) -> None:
        """Raise a ValueError if the pass has task ids other than the merged task.

        Args:
            merged: Merged task of each adapter.
        """
        now = self.passes.current
        if now is not None and now.task_ids is not None and {now.common_task} != set(merged.values()):
            raise ValueError(
                f"task_ids were given while the expert of task {sorted(merged.values())[0]} is merged; call "
                "`unmerge_adapter()` first."
            )

    def warn_of_missing_labels(self) -> None:
        """Say once what a router reads in a language model that is called without labels."""
        self._warn_once(
            "The router of a model that predicts its own input reads the prompt only: the tokens before the first "
            "label that is not -100, or what `generate` is given. This call had neither, so the router reads the "
            "first token. Pass labels, or logits_to_keep=1 where only the last token's prediction counts."
        )

    def _warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def _get_active_configs(self) -> list[tuple[str, MolaConfig]]:
        if self.disable_adapters:
            return []
        return [(name, self.mola_config[name]) for name in self.active_adapters if name in self.mola_config]


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
