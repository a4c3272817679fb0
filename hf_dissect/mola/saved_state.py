"""The part of the base model that is trained and saved with an adapter, and the report of a file that does not fit."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.layer import MolaLayer

_LOGIT_PARAMETERS = ("logit_scale", "logit_bias")


def select_base_state(
    model: nn.Module, config: MolaConfig, adapter_name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the entries of the base model that are trained and saved with an adapter.

    Args:
        model: Base model with the adapter in it.
        config: Configuration of the adapter.
        adapter_name: Name of the adapter.
        state: Parameters or state dict of the model, by name.

    Returns:
        The matching entries of `state`.
    """
    names: set[str] = set()
    prefixes = tuple(
        f"{name}.base_layer."
        for name, module in model.named_modules()
        if isinstance(module, MolaLayer) and adapter_name in module.mola_A
    )
    if config.train_base:
        auxiliary = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        adapter_state = _filter_state_dict_by_key_prefixes(
            state, _get_tuner_state_dict_key_prefixes(model) | auxiliary
        )
        base_names = [name for name in state if name not in adapter_state]
        # Batch-norm statistics depend on the trained weights, so they are saved with any part of the base.
        buffers = {name for name, _ in model.named_buffers()}
        names |= {
            name for name in base_names if config.train_base == "all" or name in buffers or name.startswith(prefixes)
        }
    if config.train_logit_scale:
        names |= {name for name in state if name.rpartition(".")[2] in _LOGIT_PARAMETERS}
    return {name: value for name, value in state.items() if name in names}


def check_unmerged(model: nn.Module, config: MolaConfig, adapter_name: str) -> None:
    """Raise a ValueError if the base is saved with an adapter and has an expert in it.

    Args:
        model: Base model.
        config: Configuration of the adapter that is saved.
        adapter_name: Name of the adapter.
    """
    if config.train_base and any(isinstance(module, MolaLayer) and module.merged for module in model.modules()):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged, and train_base={config.train_base!r} saves the base: once loaded, "
            "it would have the expert twice. Call unmerge_adapter() first, or save what merge_and_unload() returns."
        )


def check_fit(model: nn.Module, config: MolaConfig, adapter_name: str, saved: list[str]) -> None:
    """Raise a ValueError unless an adapter file has exactly the weights that an adapted model expects.

    Args:
        model: Model with the layers of the adapter.
        config: Configuration of the adapter.
        adapter_name: Name of the adapter.
        saved: Names of the adapter's weights in the file, as the model names them.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    found, wanted = ({key.removeprefix("base_model.model.") for key in keys} for keys in (saved, expected))
    if missing := sorted(wanted - found):
        raise ValueError(_describe_misfit(config, "has no weights for", missing))
    if unexpected := sorted(found - wanted):
        raise ValueError(_describe_misfit(config, "has weights for layers that this base does not have:", unexpected))


def _describe_misfit(config: MolaConfig, problem: str, keys: list[str]) -> str:
    """Compose the error message for an adapter file that does not fit a model.

    Args:
        config: Configuration of the adapter.
        problem: Predicate of the sentence, followed by the keys.
        keys: Names of the parameters concerned; the first three are printed.
    """
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    if all("mola_router" in key and ".blocks." in key for key in keys):
        return (
            f"The adapter does not fit its configuration: its file {problem} {', '.join(keys[:3])}{more}. Its router "
            f"is not the network that router_architecture={config.router_architecture!r} names; set this to the one "
            "that the adapter was trained with, or load the adapter with the configuration that was saved with it."
        )
    return (
        f"The adapter does not fit this base model: its file {problem} {', '.join(keys[:3])}{more}. It was made for "
        f"{config.base_model_name_or_path or 'an unnamed model'}; load it on that base, or check that the file "
        "is complete."
    )
