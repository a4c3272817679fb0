"""Figures of a distillation for `metrics.json`, made of what the trainer knows."""

from collections.abc import Mapping

from hf_dissect.distillation.training_args import OWN_FIELDS
from hf_dissect.evaluation import format_results_table

SHOWN_SETTINGS = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
SHOWN_SETTINGS += ("learning_rate", "weight_decay", "warmup_steps", "bf16", "fp16", "seed", *OWN_FIELDS)
"""Arguments that `metrics.json` holds, whether they have their default or not."""


def figures_table(figures: Mapping[str, float], method: str | None = None) -> str:
    """Format accuracies and R@1, in per cent, as a table of one row that `method` names."""
    row = {name: 100 * value for name, value in figures.items() if name.endswith(("_accuracy", "R@1"))}
    if not row:
        return "Nothing was evaluated: there are no validation or test rows."
    named = {} if method is None else {"method": method}
    return format_results_table([named | row], [*named, *row], decimals=1)


def last_diagnostics(log_history: list[dict]) -> dict[str, float]:
    """Return the last logged figures of the terms, the discriminator and the accuracies in training."""
    logged = next((entry for entry in reversed(log_history) if "loss" in entry), {})
    known = ("information_", "discriminator_", "generator_", "loss_")
    return {name: value for name, value in logged.items() if name.startswith(known) or name.endswith("_accuracy")}
