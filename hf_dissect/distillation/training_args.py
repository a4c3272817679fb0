"""Arguments of a distillation: those of the Trainer and its own."""

from dataclasses import dataclass

from transformers import TrainingArguments

from hf_dissect.distillation.schema import DistillationDataSection, DistillationSettings
from hf_dissect.settings import declared, list_in_docstring, list_settings, setting
from hf_dissect.training.training_args import BaseTrainingArguments


@list_in_docstring
@dataclass
class DistillationTrainingArguments(DistillationSettings, BaseTrainingArguments):
    """Arguments of `DistillationTrainer`: all of `transformers.TrainingArguments`, and the ones below.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    student_column: str = setting("image", "Column of the student's modality.")
    label_column: str = declared(DistillationDataSection, "label_column")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "term_weights"]

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the columns are chosen by their modality
        super().__post_init__()
        for name, problem in self.conflicts():
            raise ValueError(f"{name}={problem}.")


AuxiliaryDistillationArguments = DistillationTrainingArguments
"""Former name of the arguments, which `training_args.bin` in earlier checkpoints holds."""

OWN_FIELDS = tuple(list_settings(DistillationTrainingArguments))
"""Names of the arguments that `transformers.TrainingArguments` lacks."""
