"""Distillation from modalities that exist at training time only, after AMID (CVPR 2023, arXiv 2306.07646).

This is a reconstruction from the paper's abstract, made without its equations, networks and settings, and may differ
from them. Importing this package, or `hf_dissect` alone, registers the students and the small encoders with
`AutoModel`; it does not import the Trainer.
"""

import importlib
from typing import Any

from hf_dissect.distillation.encoders import (
    FrameSequenceEncoder,
    FrameSequenceEncoderConfig,
    SequenceEncoder,
    SequenceEncoderConfig,
    standardisation,
)
from hf_dissect.distillation.student import StudentConfig, StudentForClassification

# Imported on first use: a saved student needs no Trainer.
_HOMES = {
    "AuxiliaryDistillationArguments": "hf_dissect.distillation.training_args",
    "Criterion": "hf_dissect.distillation.criterion",
    "AuxiliaryDistillationTrainer": "hf_dissect.distillation.trainer",
    "DistillationTrainer": "hf_dissect.distillation.trainer",
    "DistillationRecipe": "hf_dissect.distillation.recipe",
    "DistillationTrainingArguments": "hf_dissect.distillation.training_args",
    "METHODS": "hf_dissect.distillation.terms",
    "TermWeights": "hf_dissect.distillation.terms",
    "choose_method": "hf_dissect.runs.pilot",
    "recall_at_1": "hf_dissect.distillation.evaluation",
}

__all__ = [
    "FrameSequenceEncoder",
    "FrameSequenceEncoderConfig",
    "SequenceEncoder",
    "SequenceEncoderConfig",
    "StudentConfig",
    "StudentForClassification",
    "standardisation",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
