"""The tuner: puts MoLA layers and their routing into a base model, and takes them out again."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.integrations import init_empty_weights
from torch import nn

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.layer import MolaLayer, new_layer
from hf_dissect.mola.lora_export import export_task_as_lora
from hf_dissect.mola.router import Router, check_router_input, new_router
from hf_dissect.mola.routing import MolaTunerLayer, Routing, mola_routing
from hf_dissect.mola.saved_state import base_state, misfit
from hf_dissect.mola.target_modules import TARGET_MODULES
from hf_dissect.mola.towers import input_layer, num_channels, output_dim, router_sources, towers_of


class MolaModel(BaseTuner):
    """Creates a mixture of low-rank adapters in a pretrained model (MoLA, ICML 2024, arXiv 2406.09679).

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`MolaConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
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
        - **peft_config** ([`MolaConfig`]): The configuration of the adapter.
    """

    prefix: str = "mola_"
    tuner_layer_cls = MolaTunerLayer
    target_module_mapping = TARGET_MODULES

    # ---- making an adapter ----

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put the layers of one adapter into the model, and its router beside them."""
        config = self.peft_config[adapter_name]
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            router = self._new_router(config, model)  # first, as it may fail
        present = mola_routing(model)
        routing = Routing(model) if present is None else present
        object.__setattr__(self, "routing", routing)  # a reference: its place is in the model
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            if present is None:
                routing.detach()
            raise
        if present is None:
            # Only now, lest the layers of the router be taken for layers of the model.
            model.mola = routing
        routing.add_adapter(adapter_name, config, router, model)
        routing._active_adapter = self.active_adapters
        if router is not None:
            # No more than this one: another adapter must not begin or cease to be trained because of it.
            router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        routing._move_adapter_to_device_of_base_layer(adapter_name, *_device_and_dtype(model))

    def _new_router(self, config: MolaConfig, model: nn.Module) -> Router | None:
        if config.variant == "grad":
            return None
        takes_pixels = "pixel_values" in inspect.signature(model.forward).parameters
        if config.router_input is None:
            config.router_input = "pixels" if takes_pixels else "embeddings"
        check_router_input(config.router_input)
        if config.router_input == "pixels" and not takes_pixels:
            raise ValueError(
                f"router_input='pixels', but {type(model).__name__} takes no pixel_values: use 'embeddings' for "
                "models without images."
            )
        if config.router_input not in ("pixels", "embeddings"):
            return new_router(config, model, {}, {})
        towers = towers_of(model)
        sources = router_sources(config.router_input, list(towers))
        dims = {
            tower: num_channels(module) if sources[tower] == "pixels" else output_dim(input_layer(module))
            for tower, module in towers.items()
        }
        return new_router(config, model, sources, dims)

    def _create_and_replace(
        self,
        peft_config: MolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            warnings.warn(f"{current_key} is left out: nn.MultiheadAttention does not call it.", stacklevel=2)
            return
        r, alpha = peft_config.rank_of(current_key), peft_config.alpha_of(current_key)
        if isinstance(target, MolaLayer):
            target.update_layer(adapter_name, r, alpha, peft_config)
            return
        layer = new_layer(target, self.routing, self.routing.tower_of(current_key))
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, r, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained before it is made active
        self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: MolaConfig) -> None:
        super()._check_new_adapter_config(config)
        changing = [name for name, other in self.peft_config.items() if other.train_base or other.train_logit_scale]
        if changing and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter {changing[0]!r} changes the base model (train_base or train_logit_scale), which another "
                "adapter would share; load such an adapter alone."
            )
        if config.train_logit_scale and not hasattr(self.model, "logit_scale"):
            raise ValueError(f"train_logit_scale=True: {type(self.model).__name__} has no logit_scale.")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            if not config.inference_mode:
                names = set(base_state(model, config, adapter_name, dict(model.named_parameters())))
                for name, parameter in model.named_parameters():
                    if name in names:
                        parameter.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.routing.align_buffers(adapter_name)

    # ---- using it ----

    def set_task(self, task: int | None, adapter_name: str | None = None) -> None:
        """Fix the task of a grad adapter for passes without `task_ids`, and for merging; None: no longer.

        Args:
            task: from 0 to `num_experts - 1`.
            adapter_name: the adapter; None: all active ones.

        Raises:
            ValueError: there is no such task, the adapter is no grad adapter, or it is merged.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        for name in names:
            config = self.peft_config[name]
            if config.variant != "grad":
                raise ValueError(f"Adapter {name!r} has a router: it needs no task.")
            if task is not None and (isinstance(task, bool) or task not in range(config.num_experts)):
                raise ValueError(f"task={task!r}: adapter {name!r} has the tasks 0 to {config.num_experts - 1}.")
            if any(name in layer.merged_adapters for layer in self._layers()):
                raise ValueError(f"Adapter {name!r} is merged; call `unmerge_adapter()` before another task is set.")
        for name in names:
            self.routing.fixed_task.pop(name, None)
            if task is not None:
                self.routing.fixed_task[name] = task

    def routing_weights(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """The router's weights in the last forward pass, for plots.

        Returns:
            Tower (`"image"` and `"text"` of a dual encoder, otherwise `"model"`) -> `(B, E)`, without gradient.
        """
        return self.routing.last_weights(adapter_name)

    def export_task_as_lora(self, task: int, save_directory: str, adapter_name: str = "default") -> None:
        """Save the expert of one task as a LoRA adapter, which PEFT loads without this package.

        Args:
            task: from 0 to `num_experts - 1`.
            save_directory: the folder to write.
            adapter_name: the adapter.

        Raises:
            ValueError: the adapter has a router, there is no such task, the base was trained as well, or a layer is of
                a kind that LoRA cannot express.
        """
        export_task_as_lora(self.model, self.peft_config[adapter_name], adapter_name, task, save_directory)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "MoLA does not support adapter_names (several adapters in one batch); for several tasks in one batch "
                "use one adapter with variant='grad' and task_ids."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("MoLA does not support add_weighted_adapter: experts are weighted per sample.")

    def _layers(self) -> Iterator[MolaLayer]:
        return (module for module in self.model.modules() if isinstance(module, MolaLayer))

    # ---- merging, taking it out ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the expert of the fixed task, see [`MolaModel.set_task`]."""
        self._check_tasks_to_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_tasks_to_merge(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.peft_config:
                self.routing.task_to_merge(name)  # raises before the first layer is changed

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_tasks_to_merge(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.routing.detach()
        del model.mola
        return model

    # ---- saving and loading ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MolaConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        adapter = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return adapter | base_state(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The router is a module with modules in it, so its adapter name may stand anywhere in the key.
        of_adapter = re.sub(rf"(\.{cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)
        return of_adapter if of_adapter != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MolaConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saved = {key.removeprefix("base_model.model.") for key in remapped if f".{cls.prefix}" in key}
        expected = {
            key.removeprefix("base_model.model.")
            for key in _filter_state_dict_by_key_prefixes(
                model.state_dict(), _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
            )
        }
        if missing := sorted(expected - saved):
            raise ValueError(misfit(config, "has no weights for", missing))
        if unexpected := sorted(saved - expected):
            raise ValueError(misfit(config, "has weights for layers that this base does not have:", unexpected))
        return remapped


def _device_and_dtype(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    of_adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer")
    }
    parameter = next((p for p in model.parameters() if id(p) not in of_adapters and p.is_floating_point()), None)
    return (None, None) if parameter is None else (parameter.device, parameter.dtype)
