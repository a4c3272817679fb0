"""Places of the settings of a recipe, for those who write one elsewhere or by a common short name."""

import dataclasses
from collections.abc import Mapping

from hf_dissect.recipe.fields import training_fields
from hf_dissect.settings import list_members, list_settings

SHORT_NAMES = {
    "lr": ("training.learning_rate",),
    "epochs": ("training.num_train_epochs",),
    "num_epochs": ("training.num_train_epochs",),
    "steps": ("training.max_steps",),
    "batch_size": ("training.per_device_train_batch_size", "evaluation.batch_size"),
    "train_batch_size": ("training.per_device_train_batch_size",),
    "eval_batch_size": ("evaluation.batch_size",),
    "warmup": ("selection.warmup_epochs", "training.warmup_steps"),
    "scheduler": ("training.lr_scheduler_type",),
    "optimizer": ("training.optim",),
    "workers": ("data.num_workers",),
    "dataset": ("data.path",),
    "output": ("training.output_dir",),
}
"""Dotted keys that are meant by names of other programs."""


def list_places(sections: Mapping[str, type]) -> dict[str, list[str]]:
    """Return the dotted keys of a recipe by their last part.

    Args:
        sections: Dataclass of each section, by name.
    """
    places: dict[str, list[str]] = {name: list(keys) for name, keys in SHORT_NAMES.items()}
    places.update({name: [f"training.{name}"] for name in training_fields()})
    for key, section in sections.items():
        for name, (expected, _) in list_settings(section).items():
            places.setdefault(name, []).append(f"{key}.{name}")
            for member in list_members(expected):
                if isinstance(member, type) and dataclasses.is_dataclass(member):
                    for inner in list_settings(member):
                        places.setdefault(inner, []).append(f"{key}.{name}.{inner}")
    return {name: list(dict.fromkeys(keys))[:4] for name, keys in places.items()}
