"""What of the base model is trained and saved with an adapter, and what is said when a file does not fit a base."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.layer import MolaLayer

_LOGIT_PARAMETERS = ("logit_scale", "logit_bias")


def base_state(
    model: nn.Module, config: MolaConfig, adapter_name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The entries of the base model in `state` that belong to an adapter, as they are trained with it."""
    names: set[str] = set()
    prefixes = tuple(
        f"{name}.base_layer."
        for name, module in model.named_modules()
        if isinstance(module, MolaLayer) and adapter_name in module.mola_A
    )
    if config.train_base:
        auxiliary = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        of_adapters = _filter_state_dict_by_key_prefixes(state, _get_tuner_state_dict_key_prefixes(model) | auxiliary)
        of_base = [name for name in state if name not in of_adapters]
        # Batch-norm statistics follow the weights, wherever they are trained.
        buffers = {name for name, _ in model.named_buffers()}
        names |= {
            name for name in of_base if config.train_base == "all" or name in buffers or name.startswith(prefixes)
        }
    if config.train_logit_scale:
        names |= {name for name in state if name.rpartition(".")[2] in _LOGIT_PARAMETERS}
    return {name: value for name, value in state.items() if name in names}


def misfit(config: MolaConfig, problem: str, keys: list[str]) -> str:
    """The message for an adapter file that does not fit the model, whose `problem` concerns the parameters `keys`."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"The adapter does not fit this base model: its file {problem} {', '.join(keys[:3])}{more}. It was made for "
        f"{config.base_model_name_or_path or 'an unnamed model'}; load it on that base, or see whether the file "
        "is whole."
    )
