"""Figures and files that all kinds of runs leave in their folders."""

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
_DERIVED_SETTINGS = {"dataloader_pin_memory", "report_to"}  # they depend on the machine


def list_changed_settings(args: TrainingArguments, always: Iterable[str] = ()) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, without paths and tokens.

    Args:
        args: Arguments of the run.
        always: Names of arguments that are returned in any case, before the others.

    Returns:
        Values by name.
    """
    changed = {name: getattr(args, name) for name in always}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        plain = isinstance(value, bool | int | float | str | dict | list) or value is None
        default = _find_default(field)
        # None and an empty or false value mean the same.
        changes = value != default and bool(value or default)
        if field.init and plain and changes and field.name not in _PRIVATE_SETTINGS | _DERIVED_SETTINGS:
            changed[field.name] = value
    return changed


def _find_default(field: dataclasses.Field) -> Any:
    # A second instance of the arguments would reset the state of the processes that the trainer still needs.
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def list_times(seconds: Mapping[str, float], parts: Iterable[str]) -> dict[str, float]:
    """Return the seconds of the given parts of a run as `<part>_s`, after their sum as `total_s`."""
    named = {f"{part}_s": seconds.get(part, 0.0) for part in parts}
    return {"total_s": sum(named.values()), **named}


def list_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed versions of Python and of some packages, by name."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under a temporary name and rename it, so that no reader finds a part of it."""
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def drop_speed(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Remove the speed of an evaluation from its figures, and a prefix from their names.

    Args:
        figures: Figures by name, as an evaluation of the Trainer returns them.
        prefix: Prefix of the names, such as "test".
    """
    speed = ("_runtime", "_per_second", "_preparation_time", "epoch")
    return {key.removeprefix(f"{prefix}_"): value for key, value in figures.items() if not key.endswith(speed)}


def replace_non_finite(value: Any) -> Any:
    """Replace each number in plain data that is NaN or infinite, which JSON cannot hold, by None."""
    if isinstance(value, Mapping):
        return {key: replace_non_finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
