"""Training arguments that all trainers of the package share, checked against the declarations of the settings."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_dissect.recipe.schema import SelectionSection, TrainingSection
from hf_dissect.settings import check_values, declared, setting


@dataclass
class BaseTrainingArguments(TrainingArguments):
    """Base of the training arguments: all of `transformers.TrainingArguments`, and those of both kinds of runs."""

    if TYPE_CHECKING:
        output_dir: str = ""  # `TrainingArguments` replaces None

    average_weights: float | None = declared(TrainingSection, "average_weights")
    report_pairs: bool = declared(TrainingSection, "report_pairs")
    max_bad_fraction: float = declared(SelectionSection, "max_bad_fraction")
    save_run_folder: bool = setting(
        True,
        "When training ends, write the model, metrics.json, report.html, a card and what else the run keeps to the "
        "root of output_dir.",
    )

    def __post_init__(self) -> None:
        if is_one_of_several_without_accelerator():
            self.use_cpu = True  # otherwise each process would train alone and overwrite the files of the others
        config = self.accelerator_config
        is_chosen = config is not None and not (isinstance(config, dict) and "non_blocking" not in config)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning has no use here, and torch warns of it in each epoch
        elif self.dataloader_pin_memory and not is_chosen:
            # From page-locked memory, batches are copied while the host prepares what follows.
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]  # read by `super().__post_init__`
        check_values(type(self), vars(self))
        if self.average_weights is not None:
            self._check_averaging()

    def _check_averaging(self) -> None:
        optimizer = OptimizerNames(self.optim).value
        if self.load_best_model_at_end:
            raise ValueError(
                f"average_weights={self.average_weights} makes a mean the final model, and load_best_model_at_end the "
                "best checkpoint; set average_weights to None or load_best_model_at_end to False."
            )
        if optimizer.startswith("schedule_free"):
            raise ValueError(
                f"average_weights={self.average_weights} cannot be used with optim={optimizer!r}, which averages the "
                "weights itself; leave average_weights out, or choose another optimiser."
            )


def is_one_of_several_without_accelerator() -> bool:
    """Return True for one of several processes on a machine without an accelerator, which must use the CPU."""
    chosen = "ACCELERATE_TORCH_DEVICE" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not chosen and not torch.accelerator.is_available()
