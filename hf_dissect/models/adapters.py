"""PEFT adapters: creation from a recipe, and saving and loading together with the base they need."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PromptLearningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

import hf_dissect.mola  # noqa: F401 (registers the type with PEFT)
from hf_dissect.models.families import TOWERS, bare_model, freeze_tower
from hf_dissect.models.target_modules import set_target_modules

BASE_FOLDER = "base_model"
"""Subfolder of an adapter's folder for its base model, if that has no name to load it by."""

SET_BY_THE_RUN = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
"""Fields of PEFT's configurations that are not settings of a recipe."""


def adapter_types() -> dict[str, type[PeftConfig]]:
    """Return the configuration class of each type of adapter, by its name in a recipe.

    Soft prompts are left out, because they need a decoder.
    """
    return {
        kind.value.lower(): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if kind in PEFT_TYPE_TO_TUNER_MAPPING and not issubclass(config, PromptLearningConfig)
    }


def adapter_config(settings: Mapping[str, Any]) -> PeftConfig:
    """Build the configuration that the section `adapter` of a recipe describes.

    Args:
        settings: The `type` of the adapter, and fields of its configuration.

    Raises:
        ValueError: If the configuration refuses a value.
        TypeError: If the configuration has no such field, or refuses the type of a value.
    """
    fields = dict(settings)
    return adapter_types()[fields.pop("type")](**fields)


def add_adapter(model: PreTrainedModel, settings: Mapping[str, Any], frozen_tower: str | None = None) -> PeftModel:
    """Wrap a model with the adapter that a recipe describes.

    Args:
        model: Dual encoder.
        settings: Section `adapter` of the recipe, see `adapter_config`.
        frozen_tower: Tower to leave as it is, `"vision"` or `"text"`: it gets no adapter, and none of its weights
            train.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If the adapter does not fit the model, or the model has one already.
    """
    if find_adapted(model) is not None:
        raise ValueError(
            "adapter: model.name_or_path holds an adapter already, whose training continues; set adapter to null, or "
            "name the adapter's base model."
        )
    try:
        config = adapter_config(settings)
        if frozen_tower is not None and hasattr(config, "exclude_modules"):
            config.exclude_modules = _build_exclusion_pattern(frozen_tower, config.exclude_modules)
        set_target_modules(config, model, frozen_tower)
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"adapter: {error}") from error
    if frozen_tower is not None:
        freeze_tower(adapted, frozen_tower)
    return adapted


def _build_exclusion_pattern(tower: str, given: Any) -> str:
    """Return a pattern of the modules in a tower and of those that are excluded by a pattern or by names."""
    patterns = [rf"(.*\.)?({'|'.join(TOWERS[tower])})\..*"]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.append(rf"(.*\.)?({'|'.join(map(re.escape, given))})")
    return "|".join(f"({pattern})" for pattern in patterns)


def describe_adapter(model: nn.Module) -> dict[str, Any] | None:
    """Describe a model's adapter as plain data.

    Args:
        model: Model, wrapped or not.

    Returns:
        The `type`, the number of `trained_parameters`, and the `settings` that differ from their defaults; None
        without an adapter.
    """
    adapted = find_adapted(model)
    if adapted is None:
        return None
    config = _get_config(adapted)
    defaults = type(config)()
    shown = {"variant", "num_experts", "r", "decorrelation_weight"}
    settings = {}
    for name, value in config.to_dict().items():
        value = sorted(value) if isinstance(value, set) else value
        changed = value != getattr(defaults, name, None) and isinstance(value, bool | int | float | str | list | dict)
        if name not in SET_BY_THE_RUN and (name in shown or changed):
            settings[name] = value
    return {
        "type": _get_type_name(config).lower(),
        "trained_parameters": sum(part.numel() for part in adapted.parameters() if part.requires_grad),
        "settings": settings,
    }


def find_base(model: nn.Module) -> str | None:
    """Return the name or path of the base of a model's adapter; None without an adapter or a name."""
    adapted = find_adapted(model)
    return None if adapted is None else _get_config(adapted).base_model_name_or_path or None


# ---- saving and loading ----


def is_adapter(name_or_path: str) -> bool:
    """Return True if a folder, or a repository of the Hub, holds an adapter instead of a whole model."""
    return find_adapter_config_file(name_or_path) is not None


def load_adapter(name_or_path: str, trust_remote_code: bool = False) -> PeftModel:
    """Load an adapter and its base: the model that it names, or else the one saved next to it by `save_base`.

    Args:
        name_or_path: Hub id or local folder of the adapter.
        trust_remote_code: True to allow code from the base model's repository to run.

    Returns:
        The wrapped model in evaluation mode.

    Raises:
        OSError: If one of the two cannot be read or downloaded.
        ValueError: If one of the two is not a valid model.
    """
    base_name = PeftConfig.from_pretrained(name_or_path).base_model_name_or_path
    try:
        if base_name:
            base = AutoModel.from_pretrained(base_name, dtype=torch.float32, trust_remote_code=trust_remote_code)
        else:
            base = _load_base(name_or_path)
    except (OSError, ValueError) as error:
        where = f"the base model {base_name!r} of the adapter" if base_name else f"its subfolder {BASE_FOLDER!r}"
        raise type(error)(f"{where} cannot be loaded: {error}") from error
    if not base_name:
        base.name_or_path = ""  # without a name, so that the next run saves it as well
    return PeftModel.from_pretrained(base, name_or_path, is_trainable=True).eval()


def save_base(model: nn.Module, folder: str | Path) -> None:
    """Write the base model next to an adapter, if only this run has it because it was built from a configuration.

    Nothing is written for a base with a name, or for a model without an adapter.

    Args:
        model: Model, wrapped or not.
        folder: Folder of the adapter.
    """
    adapted = find_adapted(model)
    if adapted is None or find_base(adapted):
        return
    base: Any = bare_model(adapted)
    with torch.device("meta"):
        names = type(base)(base.config).state_dict().keys()
    tensors = {_strip_wrappers(name): tensor for name, tensor in base.state_dict().items()}
    is_injected, base._hf_peft_config_loaded = base._hf_peft_config_loaded, False  # else only the adapter is saved
    try:
        base.save_pretrained(Path(folder) / BASE_FOLDER, state_dict={name: tensors[name] for name in names})
    finally:
        base._hf_peft_config_loaded = is_injected


def _load_base(name_or_path: str) -> PreTrainedModel:
    # Without adapter_kwargs, transformers would find the adapter next to the subfolder, and ask for its base again.
    place = {"subfolder": BASE_FOLDER, "adapter_kwargs": {"subfolder": BASE_FOLDER}}
    return AutoModel.from_pretrained(name_or_path, dtype=torch.float32, **place)


def restore_base(model: nn.Module, folder: str | Path) -> None:
    """Load the weights that `save_base` wrote into the model's base, if there are any.

    Args:
        model: Model, wrapped or not.
        folder: Folder of the adapter.
    """
    adapted = find_adapted(model)
    if adapted is None or not (Path(folder) / BASE_FOLDER).is_dir():
        return
    base = bare_model(adapted)
    saved = _load_base(str(folder)).state_dict()
    names = {name: _strip_wrappers(name) for name in base.state_dict()}
    base.load_state_dict({name: saved[own] for name, own in names.items() if own in saved}, strict=False)


def restore_adapter(model: nn.Module, folder: str | Path) -> bool:
    """Load what a checkpoint holds of a model with an adapter and the Trainer does not load by itself.

    That is the base that `save_base` wrote, and an adapter that `add_adapter` of transformers put into the model.

    Args:
        model: Model, wrapped or not.
        folder: Folder of the adapter.

    Returns:
        True if nothing is left for the Trainer to load.
    """
    restore_base(model, folder)
    adapted, weights = find_adapted(model), Path(folder) / "adapter_model.safetensors"
    if adapted is None or isinstance(adapted, PeftModel) or not weights.is_file():
        return False
    state = {name.removeprefix("base_model.model."): weight for name, weight in load_file(weights).items()}
    set_peft_model_state_dict(adapted, state, adapter_name=get_active_adapter(adapted))
    return True


def list_unsaved_weights(model: nn.Module, reloaded: nn.Module) -> list[str]:
    """Return the names of the weights that train and that saving and loading does not bring back.

    Args:
        model: Model, with or without an adapter.
        reloaded: Model that was loaded from its files.
    """
    trained = {name: part for name, part in bare_model(model).named_parameters() if part.requires_grad}
    adapted = find_adapted(model)
    if adapted is None:
        return sorted(trained.keys() - bare_model(reloaded).state_dict(keep_vars=True).keys())
    saved = get_peft_model_state_dict(adapted, adapter_name=get_active_adapter(adapted)).values()
    places = {tensor.data_ptr() for tensor in saved}
    if not find_base(adapted):  # the base is saved, too
        loaded = {_strip_wrappers(name) for name in bare_model(reloaded).state_dict()}
        trained = {name: part for name, part in trained.items() if _strip_wrappers(name) not in loaded}
    return sorted(name for name, part in trained.items() if part.data_ptr() not in places)


def _strip_wrappers(name: str) -> str:
    """Return the name of a tensor in the base alone, without the layers that PEFT put around it."""
    return re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)", "", name)


def check_same_adapter(model: nn.Module, folder: str | Path) -> None:
    """Check, before anything is loaded, that a checkpoint holds an adapter like the model's.

    Args:
        model: Model, wrapped or not, that the checkpoint is to be loaded into.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: If the model has no adapter, or type, names or shapes differ.
        OSError: If the files cannot be read.
    """
    adapted, folder = find_adapted(model), Path(folder)
    way_out = "name a checkpoint of this run, or start again in another output_dir"
    if adapted is None:
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter, but the model to be trained has none; {way_out}"
        )
    config, weights = _get_config(adapted), folder / "adapter_model.safetensors"
    try:
        saved_type = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if not weights.is_file():
            return  # another format, which the adapter's own loader checks
        with safe_open(weights, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"adapter {str(folder)!r} cannot be read ({error}); name an earlier checkpoint") from error
    if saved_type != _get_type_name(config):
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter of type {saved_type}, but that of the model to be trained "
            f"is of type {_get_type_name(config)}; {way_out}"
        )
    expected = get_peft_model_state_dict(adapted, adapter_name=get_active_adapter(adapted))
    expected = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if Counter(saved.values()) != Counter(expected.values()):
        other = next(iter(sorted(saved.items() ^ expected.items())))
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter of another shape than that of the model to be trained, "
            f"first {other[0]} {list(other[1])}; {way_out}"
        )


def _get_type_name(config: PeftConfig) -> str:
    return cast(Enum, config.peft_type).value


def _get_config(adapted: PeftModel | PreTrainedModel) -> PeftConfig:
    return cast(Any, adapted).peft_config[get_active_adapter(adapted)]


def get_active_adapter(adapted: PeftModel | PreTrainedModel) -> str:
    """Return the name of the active adapter, the first one of several, of a model that `find_adapted` returns."""
    active: Any = adapted.active_adapters
    return (active if isinstance(adapted, PeftModel) else active())[0]


def find_adapted(model: nn.Module) -> PeftModel | PreTrainedModel | None:
    """Return the model with its adapter, inside any wrapper; None without an adapter.

    Args:
        model: Model, wrapped or not.

    Returns:
        A model of PEFT, or a model of transformers whose own `add_adapter` put the adapter into it.
    """
    inner: Any = model
    while not isinstance(inner, PeftModel):
        if getattr(inner, "_hf_peft_config_loaded", False) is True:
            return inner
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            return None
    return inner
