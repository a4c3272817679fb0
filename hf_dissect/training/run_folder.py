"""Figures and files that every finished run leaves in its folder, whatever it trained."""

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_dissect.report.data import replace_file

METRICS_FILE = "metrics.json"
PACKAGES = ("hf_dissect", "torch", "transformers", "accelerate", "datasets", "peft", "evaluate", "pillow", "numpy")
_PRIVATE_SETTINGS = {
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "initial_ledger", "push_to_hub"),
    *("hub_token", "hub_model_id", "hub_strategy", "hub_revision", "hub_private_repo", "hub_always_push"),
}
_DERIVED_SETTINGS = {"dataloader_pin_memory", "report_to"}  # what the machine has decides them


def changed_settings(args: TrainingArguments, always: Iterable[str] = ()) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, without paths and tokens.

    Args:
        args: Arguments of the run.
        always: Names of those that are returned even if they do not differ; they come first.
    """
    changed = {name: getattr(args, name) for name in always}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        plain = isinstance(value, bool | int | float | str | dict | list) or value is None
        default = _default(field)
        # What was None or empty and became false or empty did not change.
        changes = value != default and bool(value or default)
        if field.init and plain and changes and field.name not in _PRIVATE_SETTINGS | _DERIVED_SETTINGS:
            changed[field.name] = value
    return changed


def _default(field: dataclasses.Field) -> Any:
    # Not read from a second instance: making one resets the state of the processes that the trainer still needs.
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def times_of_parts(seconds: Mapping[str, float], parts: Iterable[str]) -> dict[str, float]:
    """Return the seconds of some parts of a run as `<part>_s`, with their sum as `total_s` before them."""
    named = {f"{part}_s": seconds.get(part, 0.0) for part in parts}
    return {"total_s": sum(named.values()), **named}


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the packages that a run rests on."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name first, so that a half-written file is never found."""
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def without_speed(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the measured figures of an evaluation with a prefix such as "test", without the prefix and the speed."""
    speed = ("_runtime", "_per_second", "_preparation_time", "epoch")
    return {key.removeprefix(f"{prefix}_"): value for key, value in figures.items() if not key.endswith(speed)}


def finite(value: Any) -> Any:
    """Return plain data with None for each number that could not be computed: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
