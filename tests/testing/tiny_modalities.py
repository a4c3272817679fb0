"""Rows of three modalities and encoders small enough that a test may train them."""

import numpy as np
import torch

from hf_dissect.distillation import (
    DistillationTrainer,
    DistillationTrainingArguments,
    FrameSequenceEncoder,
    FrameSequenceEncoderConfig,
    SequenceEncoder,
    SequenceEncoderConfig,
)

CLASSES = 4


def tiny_columns(count: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Depth `(n, 3, 8, 8)`, skeleton `(n, 6, 2, 3)`, inertial `(n, 8, 2)` and action, which all of them tell."""
    random = np.random.default_rng(seed)
    action = np.arange(count) % CLASSES
    depth = random.integers(0, 40, (count, 3, 8, 8), dtype=np.uint8)
    for row, number in enumerate(action):
        depth[row, :, 2 * number : 2 * number + 2] += 150
    skeleton = random.normal(size=(count, 6, 2, 3)).astype(np.float32) + action[:, None, None, None]
    inertial = random.normal(size=(count, 8, 2)).astype(np.float32) + action[:, None, None]
    return {"depth": depth, "skeleton": skeleton, "inertial": inertial, "action": action}


def tiny_student(**settings) -> FrameSequenceEncoder:
    torch.manual_seed(0)
    config = {"hidden_size": 8, "channels": [4], "grid": [4, 1], "input_mean": [40.0], "input_std": [60.0]}
    return FrameSequenceEncoder(FrameSequenceEncoderConfig(**(config | settings)))


def tiny_auxiliaries(**settings) -> dict[str, SequenceEncoder]:
    torch.manual_seed(1)
    config = {"hidden_size": 8, "num_layers": 1, "kernel_size": 3}
    return {
        name: SequenceEncoder(SequenceEncoderConfig(num_channels=channels, **(config | settings)))
        for name, channels in (("skeleton", 6), ("inertial", 2))
    }


def tiny_arguments(folder, **settings) -> DistillationTrainingArguments:
    defaults = {
        "student_column": "depth",
        "label_column": "action",
        "teacher_size": 8,
        "comparison_size": 4,
        "discriminator_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "save_run_folder": False,
        "measure_information": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DistillationTrainingArguments(str(folder), **(defaults | settings))


def tiny_trainer(folder, columns=None, evaluation=None, *, encoder=None, **settings) -> DistillationTrainer:
    return DistillationTrainer(
        tiny_student(**(encoder or {})),
        tiny_arguments(folder, **settings),
        tiny_auxiliaries(),
        tiny_columns() if columns is None else columns,
        evaluation,
    )


def weights_of(trainer: DistillationTrainer) -> torch.Tensor:
    """All weights of networks and discriminator in one vector."""
    parameters = list(trainer.model.parameters())
    if trainer.adversary is not None:
        parameters += list(trainer.adversary.discriminator.parameters())
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
