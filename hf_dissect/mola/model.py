"""The tuner, which puts MoLA layers and their routing into a base model and takes them out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from torch import nn

from hf_dissect.mola.attention import MultiheadAttention, leave_fused_paths, restore_fused_paths
from hf_dissect.mola.base_model import (
    TARGET_MODULES,
    find_batch_dim,
    find_default_targets,
    find_device_and_dtype,
    find_towers,
)
from hf_dissect.mola.base_weight import (
    can_convert,
    check_merge,
    check_trainable,
    check_trained_base,
    resolve_quantization_backend,
)
from hf_dissect.mola.calls import attach_hooks, detach_hooks
from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.frozen_statistics import keep_frozen_statistics, release_statistics
from hf_dissect.mola.layer import Linear, MolaLayer, wrap_layer
from hf_dissect.mola.norm_layer import add_task_norms, check_norms_to_merge, check_task_norms
from hf_dissect.mola.router import build_router
from hf_dissect.mola.routing import NAMES, MolaTunerLayer, Routing, choose_name, mola_routing
from hf_dissect.mola.saved_state import check_fit, check_unmerged, select_base_state
from hf_dissect.mola.task_norms import find_kind


class MolaModel(BaseTuner):
    """A pretrained model with a mixture of low-rank adapters (MoLA, ICML 2024, arXiv 2406.09679).

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`MolaConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The adapted model.

    Example:
        ```py
        >>> import hf_dissect
        >>> from peft import get_peft_model
        >>> from transformers import CLIPModel

        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> model = get_peft_model(clip, hf_dissect.MolaConfig(variant="grad", num_experts=3, r=8))
        >>> outputs = model(**batch, task_ids=task_ids)
        ```

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** (`dict[str, MolaConfig]`) -- The configuration of each adapter, by name.
    """

    prefix: str = "mola_"
    tuner_layer_cls = MolaTunerLayer
    target_module_mapping = TARGET_MODULES
    peft_config: dict[str, MolaConfig]  # type: ignore[assignment]  # PEFT's own tuners narrow it in the same way
    routing: Routing

    # ---- creating an adapter ----

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the layers of one adapter to the model, and its router next to them.

        Args:
            model: Base model.
            adapter_name: Name of the adapter.
            autocast_adapter_dtype: Cast half-precision adapter weights to single precision.
            low_cpu_mem_usage: Create empty adapter weights on the meta device.
            state_dict: Saved adapter weights, from which PEFT may infer the target modules.
        """
        config = self.peft_config[adapter_name]
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            # Before the model is changed, because it may fail.
            router = None if config.variant == "grad" else build_router(config, model)
        check_task_norms(model, config)
        present = mola_routing(model)
        routing = Routing(model) if present is None else present
        if present is None:
            choose_name(model)  # or raise an error before anything is changed
            attach_hooks(routing, model)
        object.__setattr__(self, "routing", routing)  # registered once, in the model
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            if present is None:
                detach_hooks(routing, model)
            raise
        add_task_norms(model, adapter_name, config, routing, self.active_adapters)
        routing.add_adapter(adapter_name, config, router, model)
        # Only now, so that PEFT does not take the layers of the router for layers of the model.
        routing.place_in(model)
        for tower, module in find_towers(model).items():
            routing.entries[tower].hook_input_layer(module)
        routing._active_adapter = self.active_adapters
        if router is not None:
            # Only this router: adding an adapter must not change which of the others train.
            router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        routing._move_adapter_to_device_of_base_layer(adapter_name, *find_device_and_dtype(model))
        keep_frozen_statistics(model)
        leave_fused_paths(model)

    # PEFT passes each method the configuration of its own kind, whatever the base class declares.
    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(parent, MultiheadAttention):
            return  # an adapted attention has adapted it as well
        if isinstance(parent, nn.MultiheadAttention):
            warnings.warn(
                f"{current_key} is left out: nn.MultiheadAttention does not call it. Name the attention itself in "
                f"target_modules ({current_key.rpartition('.')[0]}) to adapt its projections.",
                stacklevel=2,
            )
            return
        if peft_config.task_norms and find_kind(target) is not None:
            return  # a saved adapter's keys name the norms, which are added after the other layers
        if peft_config.train_base:
            check_trainable(current_key, target)
        r, alpha = peft_config.get_rank(current_key), peft_config.get_alpha(current_key)
        if isinstance(target, MolaLayer):
            target.update_layer(adapter_name, r, alpha, peft_config)
            return
        backend = resolve_quantization_backend(target, self.model)
        layer = wrap_layer(target, self.routing, self.routing.find_tower(current_key), backend)
        if isinstance(layer, Linear):
            batch_dim = find_batch_dim(self.model, current_key, peft_config.sequence_first)
            layer.batch_dim, layer.knows_batch_dim = batch_dim
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, r, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an added adapter does not train before it is activated
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The adapted layer holds the very module that it replaces, so that nothing has to be handed over.
        setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None and model_config["model_type"] not in self.target_module_mapping:
            peft_config.target_modules = find_default_targets(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_new_adapter_config(self, config: MolaConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        changing = [name for name, other in self.peft_config.items() if other.train_base or other.train_logit_scale]
        if changing and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter {changing[0]!r} changes the base model (train_base or train_logit_scale), which another "
                "adapter would share; load such an adapter alone."
            )
        check_trained_base(self.model, config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            if not config.inference_mode:
                names = set(select_base_state(model, config, adapter_name, dict(model.named_parameters())))
                for name, parameter in model.named_parameters():
                    if name in names:
                        parameter.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.routing.align_buffers(adapter_name)

    # ---- tasks and weights ----

    def set_task(self, task: int | None, adapter_name: str | None = None) -> None:
        """Fix the task of a grad adapter for passes without `task_ids`, and for merging.

        Args:
            task: Task from 0 to `num_experts - 1`; None to return to the configured default.
            adapter_name: Name of the adapter; None for all active ones.

        Raises:
            ValueError: If the task does not exist, the adapter has a router, or it is merged.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        for name in names:
            config = self.peft_config[name]
            if config.variant != "grad":
                raise ValueError(f"Adapter {name!r} has a router: it needs no task.")
            if task is not None and (isinstance(task, bool) or task not in range(config.num_experts)):
                raise ValueError(f"task={task!r}: adapter {name!r} has the tasks 0 to {config.num_experts - 1}.")
            if any(name in layer.merged_adapters for layer in self._layers()):
                raise ValueError(f"Adapter {name!r} is merged; call `unmerge_adapter()` before setting another task.")
        for name in names:
            self.routing.fixed_task.pop(name, None)
            if task is not None:
                self.routing.fixed_task[name] = task

    def routing_weights(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """Return the router's weights in the last forward pass, for plots.

        Args:
            adapter_name: Name of the adapter; None for the first active one.

        Returns:
            Weights `(B, E)` without gradient for each tower: `"image"` and `"text"` of a dual encoder, otherwise
            `"model"`.
        """
        return self.routing.last_weights(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "MoLA does not support adapter_names (several adapters in one batch); for several tasks in one batch "
                "use one adapter with variant='grad' and task_ids."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse the call: experts are weighted per sample, not per adapter."""
        raise NotImplementedError("MoLA does not support add_weighted_adapter: experts are weighted per sample.")

    def _layers(self) -> Iterator[MolaLayer]:
        return (module for module in self.model.modules() if isinstance(module, MolaLayer))

    # ---- merging and unloading ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the expert of the fixed task into the base weights, see [`MolaModel.set_task`].

        Args:
            adapter_names: Adapters to merge; None for the active ones.
            safe_merge: Check that each merged weight is finite before it replaces the old one.

        Raises:
            ValueError: If an adapter has a router, no task is fixed, or a base weight cannot be merged.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in self.peft_config.keys() & set(names):
            self.routing.get_task_to_merge(name)  # all checks come before any layer is changed
        check_merge(self.model, names, safe_merge)
        check_norms_to_merge(self.model, names, safe_merge)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if PEFT can convert the named adapter to LoRA, once a task is fixed by `set_task`."""
        return can_convert(self.model, self.peft_config.get(adapter_name), adapter_name)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT returns the model, but declares None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        detach_hooks(self.routing, model)
        release_statistics(model)
        restore_fused_paths(model)
        delattr(model, next(name for name in NAMES if getattr(model, name, None) is self.routing))
        return model

    # ---- saving and loading ----

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: MolaConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        check_unmerged(model, config, adapter_name)
        adapter = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return adapter | select_base_state(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The router holds modules of its own, so the adapter name can be in the middle of the key.
        shortened = re.sub(rf"(\.{cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)
        return shortened if shortened != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: MolaConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_fit(model, config, adapter_name, [key for key in remapped if f".{cls.prefix}" in key])
        return remapped
