"""Online sample selection for CLIP-like dual encoders on the Hugging Face Trainer."""

import importlib
from typing import Any

from hf_dissect.models.registration import register_with_peft_and_transformers
from hf_dissect.version import __version__

# Module of each exported name, imported on first use: `hf-dissect --help` needs neither torch nor transformers.
_HOMES = {
    "CandidateScores": "hf_dissect.selection",
    "ContrastiveLoss": "hf_dissect.losses",
    "DistillationTrainer": "hf_dissect.distillation",
    "DistillationTrainingArguments": "hf_dissect.distillation",
    "DissectTrainer": "hf_dissect.trainer",
    "DissectTrainingArguments": "hf_dissect.training_args",
    "MolaConfig": "hf_dissect.mola",
    "MolaModel": "hf_dissect.mola",
    "OnlineSelector": "hf_dissect.selection",
    "PairDataset": "hf_dissect.data",
    "Recipe": "hf_dissect.recipe.recipe",
    "SampleLedger": "hf_dissect.selection",
    "Selection": "hf_dissect.selection",
    "SelectionCollator": "hf_dissect.data_collator",
    "SelectionStrategy": "hf_dissect.selection",
    "TwinDualEncoder": "hf_dissect.models.twin_encoder",
    "audit": "hf_dissect.runs.audit",
    "audit_by_fit": "hf_dissect.runs.audit_fit",
    "evaluate_checkpoint": "hf_dissect.runs.evaluate",
    "forward_inputs": "hf_dissect.data.model_inputs",
    "load_model_and_processor": "hf_dissect.models.loading",
    "load_splits": "hf_dissect.data",
    "make_scenes": "hf_dissect.data",
    "make_strategy": "hf_dissect.selection",
    "push_run": "hf_dissect.hub.push",
    "run_recipe": "hf_dissect.runs.run",
}

__all__ = ["__version__", *_HOMES]

register_with_peft_and_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
