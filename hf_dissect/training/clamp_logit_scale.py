"""Callback that keeps the logit scale of softmax models within its limits after each step."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.models.loading import clamp_logit_scale_


class ClampLogitScale(TrainerCallback):
    """Callback that clamps the logit scale of the model, which the Trainer does not."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Clamp the scale, in place."""
        clamp_logit_scale_(model)
