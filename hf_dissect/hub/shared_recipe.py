"""Settings of a recipe that people may share: those of the experiment, and none of the machine it ran on.

The same rules apply to a recipe that is published and to one from the Hub, whose author is unknown.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from hf_dissect.hub.address import is_hub_address, is_repo_id
from hf_dissect.recipe.yaml import format_yaml

SHARED_TRAINING = frozenset(
    """
    adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bf16 bf16_full_eval data_seed dataloader_drop_last
    dataloader_prefetch_factor eval_accumulation_steps eval_delay eval_on_start eval_steps eval_strategy fp16
    fp16_full_eval full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better label_smoothing_factor learning_rate load_best_model_at_end logging_first_step logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
    num_train_epochs optim optim_args optim_target_modules per_device_eval_batch_size per_device_train_batch_size
    save_steps save_strategy save_total_limit seed tf32 torch_empty_cache_steps train_sampling_strategy use_cpu
    warmup_steps weight_decay
    """.split()
)
"""Fields of `TrainingArguments` that describe an experiment. The others write files, send or fetch something, name
accounts, or belong to a machine."""

_ADDRESSES = ("https://", "http://", "hf://")
_NEXT_TO_THE_DATA = ("image_features", "text_features", "noise_permutation")
# Section and name of each setting that names a file, a folder or a repository; further ones in `_modalities`.
_PLACES = (
    ("model", "name_or_path"),
    ("model", "second_name_or_path"),
    ("model.vision", "name_or_path"),
    ("model.text", "name_or_path"),
    ("model", "tokenizer"),
    ("data", "path"),
    ("data", "image_root"),
    *(("data", name) for name in _NEXT_TO_THE_DATA),
    ("selection", "ledger"),
    ("selection", "reference"),
    ("objective.repair", "encoder"),
    ("evaluation.zero_shot", "path"),
    ("evaluation.zero_shot", "image_root"),
)
_FILES_OF_THE_TRAINER = ("accelerator_config", "deepspeed", "fsdp_config", "resume_from_checkpoint")
_PUBLISHED_WITH_THE_MODEL = (("model", "tokenizer"), ("student", "processor"))
# Settings by which a library would fetch and run code, or read files, without asking.
_LOADERS = frozenset(
    """
    adapters attn_implementation _attn_implementation auto_map auto_mapping corda_config experts_implementation
    _experts_implementation megatron_config megatron_core quantization_config runtime_config tokenizer_kwargs
    tokenizer_name_or_path trust_remote_code
    """.split()
)
_REMOTE_CODE = "trust_remote_code"


def select_shareable(settings: dict[str, Any], repo_id: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Select the settings of a recipe that may be shared, for both kinds of recipes.

    Args:
        settings: Settings as in the YAML file; they may be faulty.
        repo_id: Repository that the model is published in; its tokenizer, or the student's processor, replaces one
            in a local folder.

    Returns:
        Copy of the settings, and the dotted keys of the settings left out, in their order.
    """
    shared, left_out = copy.deepcopy(settings), []
    training = _section(shared, "training")
    for name in [name for name in training if name not in SHARED_TRAINING]:
        if training.pop(name) is not None:
            left_out.append(f"training.{name}")
    modalities = _modalities(shared)
    for section, part, name in _list_private_places(shared):
        value = part[name]
        part[name] = repo_id if (section, name) in _PUBLISHED_WITH_THE_MODEL else None
        if name in _NEXT_TO_THE_DATA:
            part[name] = PurePath(str(value)).name
        if part[name] is None or name in _NEXT_TO_THE_DATA:
            left_out.append(f"{section}.{name}")
    left_out += _drop_loaders(_section(shared, "model.config"), "model.config")
    left_out += _drop_loaders(_section(shared, "adapter"), "adapter")
    for key, part in modalities.items():
        left_out += _drop_loaders(_section(part, "config"), f"{key}.config")
    return shared, left_out


def find_private_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Find the settings that name something only this machine has, or an address with a password.

    Files that are looked for next to the data are not among them where they are named relative to the data.

    Returns:
        Values by dotted key, in the order of the sections.
    """
    places = {
        f"{section}.{name}": part[name]
        for section, part, name in _list_private_places(settings)
        if name not in _NEXT_TO_THE_DATA or not _is_relative_name(str(part[name]))
    }
    inner = {key: _section(settings, key) for key in ("model.config", "adapter", "selection.options", "training")}
    inner |= {f"{key}.config": _section(part, "config") for key, part in _modalities(settings).items()}
    for key, part in inner.items():
        places |= {name: value for name, value in _walk(part, key) if isinstance(value, str) and is_local_path(value)}
    files = {f"training.{name}": _section(settings, "training").get(name) for name in _FILES_OF_THE_TRAINER}
    return places | {key: value for key, value in files.items() if isinstance(value, str) and Path(value).exists()}


def find_remote_code_keys(settings: dict[str, Any]) -> list[str]:
    """Find the dotted keys by which a recipe lets code from the repository of a model run."""
    sections = {"model": _section(settings, "model"), **_modalities(settings)}
    return [f"{key}.{_REMOTE_CODE}" for key, part in sections.items() if part.get(_REMOTE_CODE)]


def format_published_recipe(settings: dict[str, Any], repo_id: str) -> tuple[str, list[str]]:
    """Format `recipe.yaml` for publication in `repo_id`; return its text and the keys of the settings left out."""
    shared, left_out = select_shareable(settings, repo_id)
    lines = [f"# The recipe of this model. Repeat it with: hf-dissect train hub:{repo_id}"]
    asked = [key for key in left_out if not key.startswith("training.")]
    if asked:
        lines.append(f"# They were of one machine and are yours to set: {', '.join(asked)} (such as {asked[0]}=...)")
    return "\n".join(lines) + "\n" + format_yaml(shared), left_out


def is_local_path(text: str) -> bool:
    """Return True for text written as a path of some machine: absolute, relative to a home or to a folder."""
    return bool(re.match(r"/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:", text))


def _list_private_places(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Return section, its settings, and name of each setting whose file, folder or repository others cannot get."""
    places = [(section, _section(settings, section), name) for section, name in _PLACES]
    places += [
        (key, part, name) for key, part in _modalities(settings).items() for name in ("name_or_path", "processor")
    ]
    return [
        (section, part, name)
        for section, part, name in places
        if part.get(name) is not None and not _is_public(part[name], at_hub=_may_be_at_hub(part, name))
    ]


def _is_relative_name(text: str) -> bool:
    """Return True for a file that can only be meant relative to the data, as there is none of this machine."""
    return not is_local_path(text) and "://" not in text and not Path(text).exists()


def _walk(part: dict[str, Any] | list[Any], key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything below `key` that is neither a mapping nor a list."""
    children: list[tuple[Any, Any]] = list(part.items() if isinstance(part, dict) else enumerate(part))
    for child, value in children:
        if isinstance(value, dict | list):
            yield from _walk(value, f"{key}.{child}")
        else:
            yield f"{key}.{child}", value


def _is_public(value: Any, at_hub: bool) -> bool:
    """Return True where others can get what a setting names, and may know its name."""
    if not isinstance(value, str):
        return False
    if is_hub_address(value):
        return True
    if value.startswith(_ADDRESSES):
        # What follows a question mark may be a signature, what stands before an @ a password.
        return "?" not in value and "@" not in value.partition("://")[2].partition("/")[0] and "::" not in value
    return at_hub and not is_local_path(value) and is_repo_id(value) and not Path(value).exists()


def _may_be_at_hub(section: dict[str, Any], name: str) -> bool:
    return name in ("name_or_path", "second_name_or_path", "tokenizer", "processor", "reference", "encoder") or (
        name == "path" and section.get("source") == "hub"
    )


def _modalities(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of a distillation's student and auxiliaries, by their keys."""
    auxiliaries = _section(settings, "auxiliaries")  # whose names may have dots
    sections = {"student": settings.get("student")}
    sections |= {f"auxiliaries.{name}": part for name, part in auxiliaries.items()}
    return {key: part for key, part in sections.items() if isinstance(part, dict)}


def _drop_loaders(part: dict[str, Any] | list[Any], key: str) -> list[str]:
    """Remove settings at any depth that load code or name files; return their keys."""
    dropped = []
    children: list[tuple[Any, Any]] = list(part.items() if isinstance(part, dict) else enumerate(part))
    for child, value in children:
        if child in _LOADERS or (isinstance(value, str) and is_local_path(value)):
            part[child] = None
            dropped.append(f"{key}.{child}")
        elif isinstance(value, dict | list):
            dropped += _drop_loaders(value, f"{key}.{child}")
    return dropped


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section by its dotted name, for reading and writing; an empty one where there is no mapping."""
    part: Any = settings
    for key in name.split("."):
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}
