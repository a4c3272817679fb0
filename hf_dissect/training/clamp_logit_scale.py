"""Callback that keeps the logit scale of softmax models within its limits."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.models.loading import clamp_logit_scale_


class ClampLogitScale(TrainerCallback):
    """Callback that clamps the logit scale of the model after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Clamp the logit scale in place."""
        if model is not None:
            clamp_logit_scale_(model)
