"""The state of one forward pass: the experts in force, and the notes of the hooks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ExpertChoice:
    """The choice of experts for one forward pass, which the layers read.

    Args:
        weights: Weights `(B, E)` of a router, by adapter and tower.
        task_ids: Tasks of the samples, int64 `(B,)`.
        common_task: Task of all samples, if they share one.
        one_hot: One-hot tasks `(B, E)` of each grad adapter, if the samples do not share a task.
        device: Device of the inputs.
    """

    weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    task_ids: torch.Tensor | None = None
    common_task: int | None = None
    one_hot: dict[str, torch.Tensor] = field(default_factory=dict)
    device: torch.device | None = None


@dataclass
class ForwardPass:
    """The state of the hooks during one forward pass.

    Args:
        projections: Projected scores `(B, decorrelation_dim)` of a router, by adapter and tower.
        masks: Attention mask `(B, L)` of each tower.
        inside_model: True while the whole model runs, False while a tower was called by itself.
        checkpointed: True if gradient checkpointing will run the layers again.
        reentrant: True if its checkpoints are reentrant.
    """

    projections: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    inside_model: bool = False
    checkpointed: bool = False
    reentrant: bool = False
