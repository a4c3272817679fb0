"""The arguments that every trainer of ours shares, and their check against the declarations of the settings."""

import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from hf_dissect.recipe.schema import SelectionSection
from hf_dissect.settings import check_values, declared, setting


@dataclass
class BaseTrainingArguments(TrainingArguments):
    """Base of our arguments: all of `transformers.TrainingArguments`, and what both kinds of run share."""

    max_bad_fraction: float = declared(SelectionSection, "max_bad_fraction")
    save_run_folder: bool = setting(
        True,
        "When training ends, write the model, metrics.json, report.html, a card and what else the run keeps to the "
        "root of output_dir.",
    )

    def __post_init__(self) -> None:
        if is_one_of_several_without_accelerator():
            self.use_cpu = True  # else each process would train alone, and write over the others
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for, and torch warns of it each epoch
        check_values(type(self), vars(self))


def is_one_of_several_without_accelerator() -> bool:
    """Return whether processes were started together where torch sees no accelerator: they must use CPUs."""
    chosen = "ACCELERATE_TORCH_DEVICE" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not chosen and not torch.accelerator.is_available()
