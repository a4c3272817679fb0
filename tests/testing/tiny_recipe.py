"""A recipe that trains, evaluates and reports in about a second, for tests of whole runs."""

import copy
from pathlib import Path
from typing import Any

import yaml

from hf_dissect.recipe.recipe import Recipe

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "description": "A tiny CLIP on 64 drawn scenes.",
    "model": {
        "config": {
            "model_type": "clip",
            "projection_dim": 16,
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 16},
            "text_config": {**TOWER, "max_position_embeddings": 16},
        },
        "vocab_size": 600,
        "max_caption_length": 16,
    },
    "data": {"scenes_train": 64, "scenes_validation": 16, "scenes_test": 24, "noise_rate": 0.25},
    "evaluation": {"batch_size": 24},
    "training": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
    },
}
STEPS = 8  # 2 epochs of 64 / 16 batches


def tiny_settings(**sections: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of whole sections updated; None takes a setting away."""
    settings = copy.deepcopy(SETTINGS)
    for section, changes in sections.items():
        merged = {**settings.get(section, {}), **changes}
        settings[section] = {name: value for name, value in merged.items() if value is not None}
    return settings


def tiny_recipe(output_dir: Path, **sections: dict[str, Any]) -> Recipe:
    """The recipe, checked, with `output_dir` as its run folder."""
    sections["training"] = {**sections.get("training", {}), "output_dir": str(output_dir)}
    return Recipe.from_dict(tiny_settings(**sections))


def write_tiny_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(tiny_settings(**sections), sort_keys=False))
    return path
