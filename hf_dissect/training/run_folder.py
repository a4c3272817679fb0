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
OWN_FILES = (
    *("recipe.yaml", METRICS_FILE, "report.html", "report_data.json", "report.png", "report.svg"),
    *("ledger.safetensors", "selection.parquet", "tasks.json", "dissect_state.json", "dissect_state.safetensors"),
    *("scores.parquet", "audit.html"),
)
"""Files by which a folder is recognised as that of a run or of an audit."""
MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.bin"),
    *("*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "modules.json", "model_index.json"),
)
"""Patterns of the files of a saved model, whatever program saved it."""
WRITTEN_FILES = (
    *("README.md", "config.json", "generation_config.json", "adapter_config.json", "training_args.bin"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model.*", "pytorch_model*"),
    *("*processor_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("trainer_state.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    "ledger-*-of-*.safetensors",
)
"""Patterns of the further files that a run writes next to those by which it is recognised."""
_PRIVATE_SETTINGS = {
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "initial_ledger", "push_to_hub"),
    *("selection_reference", "sampling_file"),
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


def find_result(folder: str | Path) -> Path | None:
    """Return a file of a folder that no run may overwrite unasked: of a model, of a run or of an audit; None without.

    A checkpoint counts, too, and every file that a run would replace.
    """
    patterns = (*OWN_FILES, *MODEL_FILES, "checkpoint-*", *WRITTEN_FILES)
    return next((path for pattern in patterns for path in sorted(Path(folder).glob(pattern))), None)


def find_foreign_model(folder: str | Path) -> Path | None:
    """Return a file of a model in a folder that holds no run of this package; None without one."""
    if any((Path(folder) / name).exists() for name in OWN_FILES):
        return None
    own = {part.name for part in Path(folder).glob("training_args.bin")}
    return next(
        (path for pattern in MODEL_FILES for path in sorted(Path(folder).glob(pattern)) if path.name not in own), None
    )


def check_not_foreign(folder: str | Path, writes: bool) -> None:
    """Check that a run does not write over the model of another program.

    Args:
        folder: Folder of the run.
        writes: True if the run leaves its model there.

    Raises:
        ValueError: There is one.
    """
    if writes and (foreign := find_foreign_model(folder)) is not None:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a model that is not of a run ({foreign.name}), which the end of "
            "training would replace; name another folder, or set save_run_folder=False and save the model yourself."
        )


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
