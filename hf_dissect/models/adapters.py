"""The one place that knows of PEFT adapters: made as a recipe says, saved with what they rest on, loaded again."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

import hf_dissect.mola  # noqa: F401 (registers the type with PEFT)
from hf_dissect.models.families import TOWERS, bare_model, freeze_tower

BASE_FOLDER = "base_model"
"""Subfolder of an adapter's folder that holds its base model, where no name leads back to that."""

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
"""Fields of PEFT's configurations that are no settings of a recipe."""


def adapter_types() -> dict[str, type[PeftConfig]]:
    """The configuration of each type of adapter, by its name in a recipe; soft prompts need a decoder and are none."""
    return {
        kind.value.lower(): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if kind in PEFT_TYPE_TO_TUNER_MAPPING and not issubclass(config, PromptLearningConfig)
    }


def adapter_config(settings: Mapping[str, Any]) -> PeftConfig:
    """The configuration that a recipe's section `adapter` describes: `type`, and fields of that type.

    Raises:
        ValueError, TypeError: the configuration refuses a value.
    """
    fields = dict(settings)
    return adapter_types()[fields.pop("type")](**fields)


def add_adapter(model: PreTrainedModel, settings: Mapping[str, Any], frozen_tower: str | None = None) -> PeftModel:
    """Wrap a model with the adapter that a recipe's section describes.

    Args:
        model: a dual encoder.
        settings: see `adapter_config`.
        frozen_tower: "vision" or "text": this tower stays as it is, without an adapter, whatever the adapter would
            train of the base.

    Raises:
        ValueError: the adapter does not fit the model, or the model has one already.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "adapter: model.name_or_path holds an adapter already, and that one is trained on; set adapter to null, "
            "or name the adapter's base model."
        )
    try:
        config = adapter_config(settings)
        if frozen_tower is not None and hasattr(config, "exclude_modules"):
            config.exclude_modules = _excluding(frozen_tower, config.exclude_modules)
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"adapter: {error}") from error
    if frozen_tower is not None:
        freeze_tower(adapted, frozen_tower)
    return adapted


def _excluding(tower: str, given: Any) -> str:
    """A pattern of the modules in a tower and of those that are excluded anyway, by a pattern or by names."""
    patterns = [rf"(.*\.)?({'|'.join(TOWERS[tower])})\..*"]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.append(rf"(.*\.)?({'|'.join(map(re.escape, given))})")
    return "|".join(f"({pattern})" for pattern in patterns)


def describe_adapter(model: nn.Module) -> dict[str, Any] | None:
    """Type, number of trained parameters and settings of a model's adapter as plain data; None without one."""
    adapted = _adapted(model)
    if adapted is None:
        return None
    config = adapted.peft_config[adapted.active_adapter]
    defaults = type(config)()
    shown = {"variant", "num_experts", "r", "decorrelation_weight"}
    settings = {}
    for name, value in config.to_dict().items():
        value = sorted(value) if isinstance(value, set) else value
        changed = value != getattr(defaults, name, None) and isinstance(value, bool | int | float | str | list | dict)
        if name not in SET_BY_THE_RUN and (name in shown or changed):
            settings[name] = value
    return {
        "type": config.peft_type.value.lower(),
        "trained_parameters": sum(part.numel() for part in adapted.parameters() if part.requires_grad),
        "settings": settings,
    }


def base_of_adapter(model: nn.Module) -> str | None:
    """Name or path of the base that a model's adapter was put on; None for a base without a name."""
    adapted = _adapted(model)
    return None if adapted is None else adapted.peft_config[adapted.active_adapter].base_model_name_or_path or None


# ---- saving and loading ----


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds an adapter instead of a whole model."""
    return find_adapter_config_file(name_or_path) is not None


def load_adapted(name_or_path: str, trust_remote_code: bool = False) -> PeftModel:
    """Load an adapter and its base: the model it names, else the one saved beside it (`save_base`).

    Raises:
        OSError, ValueError: one of the two cannot be had.
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
        base.name_or_path = ""  # it has no name still, and is to be saved again with whatever is made of it
    return PeftModel.from_pretrained(base, name_or_path, is_trainable=True).eval()


def save_base(model: nn.Module, folder: str | Path) -> None:
    """Write into `folder`, an adapter's, the base model that only this run has: one built from a configuration.

    The base of a name is not written, and of any other model there is nothing to write.
    """
    adapted = _adapted(model)
    if adapted is None or base_of_adapter(adapted):
        return
    base = bare_model(adapted)
    with torch.device("meta"):
        names = type(base)(base.config).state_dict().keys()
    tensors = {_base_name(name): tensor for name, tensor in base.state_dict().items()}
    base.save_pretrained(Path(folder) / BASE_FOLDER, state_dict={name: tensors[name] for name in names})


def _load_base(name_or_path: str) -> PreTrainedModel:
    # Without adapter_kwargs, transformers looks for an adapter beside the subfolder, and for its base again.
    place = {"subfolder": BASE_FOLDER, "adapter_kwargs": {"subfolder": BASE_FOLDER}}
    return AutoModel.from_pretrained(name_or_path, dtype=torch.float32, **place)


def restore_base(model: nn.Module, folder: str | Path) -> None:
    """Put the weights that `save_base` wrote into `folder` back into the model's base, where there are any."""
    adapted = _adapted(model)
    if adapted is None or not (Path(folder) / BASE_FOLDER).is_dir():
        return
    base = bare_model(adapted)
    saved = _load_base(str(folder)).state_dict()
    names = {name: _base_name(name) for name in base.state_dict()}
    base.load_state_dict({name: saved[own] for name, own in names.items() if own in saved}, strict=False)


def _base_name(name: str) -> str:
    """What a tensor is called in the base by itself, without the layers that PEFT put around it."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def same_adapter(model: nn.Module, folder: str | Path) -> None:
    """Make sure, before anything is loaded, that a checkpoint holds an adapter like the model's.

    Raises:
        ValueError: the model has no adapter, or type, names or shapes differ.
        OSError: the files cannot be read.
    """
    adapted, folder = _adapted(model), Path(folder)
    start_anew = "name a checkpoint of this run, or start anew in another output_dir"
    if adapted is None:
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter, but the model to be trained has none; {start_anew}"
        )
    config, weights = adapted.peft_config[adapted.active_adapter], folder / "adapter_model.safetensors"
    try:
        saved_type = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if not weights.is_file():
            return  # another format or folder, which the adapter's own loader knows
        with safe_open(weights, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"adapter {str(folder)!r} cannot be read ({error}); name an earlier checkpoint") from error
    if saved_type != config.peft_type.value:
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter of type {saved_type}, but that of the model to be trained "
            f"is of type {config.peft_type.value}; {start_anew}"
        )
    expected = get_peft_model_state_dict(adapted, adapter_name=adapted.active_adapter)
    expected = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if Counter(saved.values()) != Counter(expected.values()):
        other = next(iter(sorted(saved.items() ^ expected.items())))
        raise ValueError(
            f"checkpoint {str(folder)!r} holds an adapter of another shape than that of the model to be trained, "
            f"first {other[0]} {list(other[1])}; {start_anew}"
        )


def _adapted(model: nn.Module) -> PeftModel | None:
    """The model with its adapter, out of whatever wraps it; None where there is none."""
    while not isinstance(model, PeftModel):
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(model, nn.Module):
            return None
    return model
