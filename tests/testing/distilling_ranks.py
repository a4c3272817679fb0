"""Called by test_ranks.py in two processes: trains as the one process does that the test runs on the rows of both."""

from pathlib import Path

import numpy as np
import torch

from hf_dissect.distillation import DistillationRecipe
from hf_dissect.distributed import Ranks
from hf_dissect.runs.distil import run_distillation
from testing.tiny_modalities import tiny_columns, tiny_trainer, weights_of

SETTINGS = {
    "term_weights": {"hinton": 0.5, "contrastive": 0.5},
    "memory_bank": 20,
    "retrieval_weight": 0.5,
    "embedding_size": 5,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 6,
    "logging_steps": 3,
    "measure_information": True,
}


def columns() -> dict[str, np.ndarray]:
    """Rows of which the ranks have unequally many complete ones in a batch."""
    given = tiny_columns(32)
    given["skeleton"][::5] = np.nan
    return given


def logged(trainer) -> list[dict[str, float]]:
    """The figures of the terms, in order."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in log.items() if name not in ("grad_norm", "epoch")} for log in logs]


def train_and_resume(folder: Path) -> dict:
    """Check that the processes agree and resume alike, and return their weights and figures."""
    trainer = tiny_trainer(
        folder, columns(), per_device_train_batch_size=4, save_strategy="steps", save_steps=3, **SETTINGS
    )
    trainer.train()
    weights = weights_of(trainer)
    both = trainer.ranks.gather(weights[None])
    assert torch.equal(both[0], both[1]), "the processes differ"
    again = tiny_trainer(folder, columns(), per_device_train_batch_size=4, **SETTINGS)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert torch.equal(weights, weights_of(again)), "the resumed run differs"
    assert again.measurement.measured == trainer.measurement.measured, "the resumed run measured again"
    return {"weights": weights, "logs": logged(trainer), "before": trainer.measurement.measured["before"]}


def choose_and_train(folder: Path, rows: Path) -> dict:
    """Check that the processes choose the same method, and return the metrics of a run of it."""
    encoders = ["{model_type: frame_sequence_encoder, channels: [4], hidden_size: 8, grid: [4, 1]}"]
    encoders += [f"{{model_type: sequence_encoder, num_channels: {count}, hidden_size: 8}}" for count in (6, 2)]
    names = ("student", "auxiliaries.skeleton", "auxiliaries.inertial")
    settings = [f"{name}.config={encoder}" for name, encoder in zip(names, encoders, strict=True)]
    training = ["use_cpu=true", "report_to=none", "disable_tqdm=true", "max_steps=2", "eval_strategy=no"]
    training += [f"output_dir={folder}", "per_device_train_batch_size=4"]
    settings += [f"data.path={rows}", "distillation.method=auto", *(f"training.{setting}" for setting in training)]
    recipe = DistillationRecipe.load("amid-utd-mhad", settings)
    metrics = run_distillation(recipe)
    methods = Ranks().gather_objects(metrics["method"])
    assert len(set(methods)) == 1, "the processes chose differently"
    return metrics
