"""Export of one expert as an ordinary LoRA adapter, which needs nothing but PEFT."""

from __future__ import annotations

import os

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.layer import MolaLayer


def export_task_as_lora(
    model: nn.Module, config: MolaConfig, adapter_name: str, task: int, save_directory: str
) -> None:
    """Write the expert of one task as a PEFT LoRA folder with equal outputs.

    The `g` groups of a grouped convolution share one `A` of rank `r`; they become a LoRA of rank `g * r` with a
    block-diagonal `A`.

    Args:
        model: Base model with the adapter in it.
        config: Configuration of the adapter.
        adapter_name: Name of the adapter.
        task: Task whose expert is exported, from 0 to `num_experts - 1`.
        save_directory: Folder to write.

    Raises:
        ValueError: If the adapter has a router, the task does not exist, the base was trained as well, or a layer is
            of a kind that LoRA cannot express.
    """
    _check_exportable(config, adapter_name, task)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MolaLayer) and adapter_name in module.mola_A
    }
    weights: dict[str, torch.Tensor] = {}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        A, B = _lora_weights(name, layer, adapter_name, task)
        weights[f"base_model.model.{name}.lora_A.weight"] = A
        weights[f"base_model.model.{name}.lora_B.weight"] = B
        ranks[name] = len(A)
        alphas[name] = layer.mola_scaling[adapter_name] * len(A)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # LoRA computes with any number
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
        target_modules=sorted(layers),
        lora_dropout=config.dropout,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_model_name_or_path=config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        task_type=config.task_type,
        inference_mode=True,
    )
    os.makedirs(save_directory, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    save_file(tensors, os.path.join(save_directory, "adapter_model.safetensors"), metadata={"format": "pt"})
    lora.save_pretrained(save_directory)


def _check_exportable(config: MolaConfig, adapter_name: str, task: int) -> None:
    if config.variant != "grad":
        raise ValueError(
            f"Adapter {adapter_name!r} has a router, whose weights depend on the input; a LoRA adapter cannot "
            "express it. Export an adapter with variant='grad'."
        )
    if isinstance(task, bool) or task not in range(config.num_experts):
        raise ValueError(f"task={task!r}: adapter {adapter_name!r} has the tasks 0 to {config.num_experts - 1}.")
    trained = [name for name in ("train_base", "train_logit_scale") if getattr(config, name)]
    trained += ["modules_to_save"] if config.modules_to_save else []
    trained += ["bias"] if config.bias != "none" else []
    if trained:
        raise ValueError(
            f"Adapter {adapter_name!r} was trained with {', '.join(trained)}: a LoRA of its experts alone would not "
            "give the same outputs. Use set_task(task), merge_and_unload() and save the whole model instead."
        )


def _lora_weights(name: str, layer: MolaLayer, adapter_name: str, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = layer.mola_A[adapter_name][task], layer.mola_B[adapter_name][task]
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, nn.Conv2d):
        return A, B
    if base_layer.dilation != (1, 1) or base_layer.padding_mode != "zeros":
        raise ValueError(
            f"{name} has dilation={base_layer.dilation} and padding_mode={base_layer.padding_mode!r}, which PEFT's "
            "LoRA does not carry over; use set_task(task) and merge_and_unload() instead."
        )
    groups, r = base_layer.groups, len(A)
    full = A.new_zeros(groups * r, base_layer.in_channels, *A.shape[2:])
    for group in range(groups):
        full[group * r : (group + 1) * r, group * A.shape[1] : (group + 1) * A.shape[1]] = A
    return full, B[:, :, None, None]
