"""The error of a run that diverged, raised before the weights are touched."""

import torch

from hf_dissect.training.checkpoints import last_complete_checkpoint


class NonFiniteLossError(RuntimeError):
    """The loss or a score became NaN or infinite; the weights were not stepped with it."""


def check_finite(values: torch.Tensor, what: str, sample_id: torch.Tensor, step: int, output_dir: str) -> None:
    """Make sure that all of `values` are finite.

    Args:
        values: one for all pairs `()`, or one each `(B,)`.
        what: name of the values in the error.
        sample_id: int64 `(B,)` of the pairs.
        step: optimiser step, from 0.
        output_dir: where checkpoints are.

    Raises:
        NonFiniteLossError: naming the step, the pairs and the last checkpoint.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return
    concerned = sample_id if finite.ndim == 0 else sample_id[~finite]
    shown = ", ".join(map(str, concerned.tolist()[:8]))
    checkpoint = last_complete_checkpoint(output_dir)
    raise NonFiniteLossError(
        f"At step {step} {what} is not finite (first sample ids: {shown}); the weights were not changed by it. Last "
        f"checkpoint: {checkpoint or 'none yet'}. Try a smaller learning rate, a longer learning-rate warm-up, "
        "max_grad_norm, or bf16 instead of fp16."
    )


def check_finite_weights(model: torch.nn.Module, step: int, output_dir: str) -> None:
    """Make sure that all weights are finite, before they are saved over good ones.

    Args:
        model: of which each process may hold a part only (FSDP).
        step: optimiser steps made.
        output_dir: where checkpoints are.

    Raises:
        NonFiniteLossError: naming the step, the weights and the last checkpoint.
    """
    parts = ((name, getattr(weight, "_local_tensor", weight)) for name, weight in model.named_parameters())
    wrong = [name for name, part in parts if part.is_floating_point() and not torch.isfinite(part).all()]
    if wrong:
        raise NonFiniteLossError(
            f"After step {step} {len(wrong)} weights are not finite (first: {', '.join(wrong[:3])}); they are not "
            f"saved. Last checkpoint: {last_complete_checkpoint(output_dir) or 'none yet'}. Resume from it with a "
            "smaller learning rate, a longer learning-rate warm-up, max_grad_norm, or bf16 instead of fp16."
        )
