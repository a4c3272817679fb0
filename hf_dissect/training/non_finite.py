"""Errors of a run that diverged, raised before the weights change or are saved."""

import torch

from hf_dissect.training.checkpoints import find_last_checkpoint


class NonFiniteLossError(RuntimeError):
    """Error of a loss, a score or a weight that is NaN or infinite."""


def check_finite(values: torch.Tensor, what: str, sample_id: torch.Tensor, step: int, output_dir: str) -> None:
    """Check that all values of a step are finite.

    Args:
        values: One value for all pairs `()`, or one for each pair `(B,)`.
        what: Name of the values in the error, such as "the loss".
        sample_id: Ids of the pairs, int64 `(B,)`.
        step: Optimiser step, counted from 0.
        output_dir: Folder of the run, with its checkpoints.

    Raises:
        NonFiniteLossError: A value is not finite; the message names the step, the pairs and the last checkpoint.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return
    concerned = sample_id if finite.ndim == 0 else sample_id[~finite]
    shown = ", ".join(map(str, concerned.tolist()[:8]))
    checkpoint = find_last_checkpoint(output_dir)
    raise NonFiniteLossError(
        f"At step {step} {what} is not finite (first sample ids: {shown}); the weights were not changed by it. Last "
        f"checkpoint: {checkpoint or 'none yet'}. Try a smaller learning rate, a longer learning-rate warm-up, "
        "max_grad_norm, or bf16 instead of fp16."
    )


def check_finite_weights(model: torch.nn.Module, step: int, output_dir: str) -> None:
    """Check that all weights are finite before they are saved.

    Args:
        model: Model; with FSDP, each process checks the part that it holds.
        step: Number of optimiser steps so far.
        output_dir: Folder of the run, with its checkpoints.

    Raises:
        NonFiniteLossError: A weight is not finite; the message names the step, the weights and the last checkpoint.
    """
    parts = ((name, getattr(weight, "_local_tensor", weight)) for name, weight in model.named_parameters())
    wrong = [name for name, part in parts if part.is_floating_point() and not torch.isfinite(part).all()]
    if wrong:
        raise NonFiniteLossError(
            f"After step {step} {len(wrong)} weights are not finite (first: {', '.join(wrong[:3])}); they are not "
            f"saved. Last checkpoint: {find_last_checkpoint(output_dir) or 'none yet'}. Resume from it with a "
            "smaller learning rate, a longer learning-rate warm-up, max_grad_norm, or bf16 instead of fp16."
        )
