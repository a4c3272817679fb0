"""Restoring weights from a checkpoint whose tensors transformers has renamed on saving."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_dissect.models.adapters import restore_adapter
from hf_dissect.models.families import bare_model

logger = logging.getLogger(__name__)


def restore_weights(model: nn.Module, folder: str | Path, load: Callable[[], None]) -> None:
    """Load the weights of a checkpoint, with an adapter and under whatever names they were saved.

    Args:
        model: Model, wrapped or not.
        folder: Folder of the checkpoint.
        load: Function of the Trainer that loads the weights.
    """
    if not restore_adapter(model, folder):
        load()
        restore_renamed_weights(model, folder)


def restore_renamed_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a checkpoint under their own names if the checkpoint has others.

    transformers saves some architectures (ViT) under the names of former versions, and renames them in
    `from_pretrained` only. The Trainer resumes with the names in the file, so that it would skip these tensors.

    Args:
        model: Model, wrapped or not; one with an adapter is left to the adapter's loader.
        folder: Folder of the checkpoint; one of FSDP or DeepSpeed is left to their loaders.
    """
    bare: Any = bare_model(model)
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files or not isinstance(bare, PreTrainedModel) or (Path(folder) / "adapter_config.json").is_file():
        return
    saved: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            saved |= set(weights.keys())
    own = bare.state_dict()
    if saved <= own.keys():
        return
    loaded = type(bare).from_pretrained(folder, config=bare.config, dtype=next(bare.parameters()).dtype)
    bare.load_state_dict(loaded.state_dict())
    logger.info("%d tensors of %s were saved under other names.", len(saved - own.keys()), folder)
