"""What a finished distillation leaves behind beside the student: figures, a report and a card."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_dissect.distillation.trainer import AuxiliaryDistillationTrainer


def write_distillation_folder(trainer: "AuxiliaryDistillationTrainer", test_dataset: Any = None) -> dict[str, Any]:
    trainer.save_model()
    return {}
