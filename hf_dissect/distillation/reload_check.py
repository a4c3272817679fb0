"""Check before training that the files of the student, once loaded again, give the student that trains."""

from operator import attrgetter

import torch
from torch import nn

from hf_dissect.distillation.data_collator import DistillationCollator
from hf_dissect.distillation.training_data import ModalityRows
from hf_dissect.training.reload_check import NUM_PAIRS, ReloadCheck


def make_reload_check(collator: DistillationCollator, rows: ModalityRows, column: str) -> ReloadCheck:
    """Return the check of the student, the only network that a run publishes.

    Args:
        collator: Collator of the run.
        rows: Training rows.
        column: Column of the student's modality.
    """

    def make_inputs(student: nn.Module) -> dict[str, torch.Tensor]:
        return collator([rows[row] for row in range(min(NUM_PAIRS, len(rows)))])["inputs"][column]

    return ReloadCheck(make_inputs, attrgetter("student"), "distillation.check_reload")
