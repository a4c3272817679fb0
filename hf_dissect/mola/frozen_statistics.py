"""Running statistics of layers that do not train, such as those of batch norm: they must not move either."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_dissect.mola.base_model import find_towers
from hf_dissect.mola.routing import get_own_routing, mola_routing

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def keep_frozen_statistics(model: nn.Module) -> None:
    """Let layers with running statistics behave as in evaluation while they do not train, in training mode as well.

    Otherwise the statistics of a frozen base move with each forward pass. An adapter saves no weights of its base, so
    that it would be another model once it is reloaded. A layer trains if all its parameters do. A layer without
    parameters trains if any parameter of the smallest part of the model around it does, adapters aside. With
    `train_base="targets"`, MoLA saves the statistics of the base, and they move where any weight of the tower trains.
    This is checked at each forward pass, so weights may be frozen and released at any time. Dropout is not changed.
    Calling this function again renews the hooks, for example after layers were added.

    Args:
        model: Model, wrapped or not.
    """
    release_statistics(model)
    routing = mola_routing(model)
    saves = routing is not None and any(config.train_base == "targets" for config in routing.mola_config.values())
    for around in _walk(model, ()):
        module = around[-1]
        if _has_statistics(module):
            weights = None
            if saves:
                weights = _list_weights_of_tower(around)
            elif not any(True for _ in module.parameters(recurse=False)):
                weights = _list_nearest(around)
            # First, because the spectral norm of torch is a hook itself.
            module.register_forward_pre_hook(_FollowTraining(weights), prepend=True)


def release_statistics(model: nn.Module) -> None:
    """Remove what `keep_frozen_statistics` added to a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _FollowTraining):
                del module._forward_pre_hooks[key]


class _FollowTraining:
    """Forward pre-hook that puts a layer into evaluation mode while it does not train.

    Args:
        weights: Parameters that train with the layer; None for its own.
    """

    def __init__(self, weights: list[nn.Parameter] | None) -> None:
        self.weights = weights

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not module.training:
            return
        if self.weights is None:
            trains = all(weight.requires_grad for weight in module.parameters(recurse=False))
        else:
            trains = not self.weights or any(weight.requires_grad for weight in self.weights)
        if not trains:
            module.training = False  # of this module alone: dropout inside stays as it is


def _has_statistics(module: nn.Module) -> bool:
    buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer is not None}
    if any(name in buffers for name in STATISTICS):
        return True
    if hasattr(module, "gradient_checkpointing"):
        return False  # a block of transformers, whose mode decides on checkpoints
    # Layers of other libraries name their statistics as they like; what is not saved is not of this kind.
    saved = buffers.keys() - module._non_persistent_buffers_set
    return any(buffers[name].is_floating_point() for name in saved)


def _walk(module: nn.Module, around: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, ...]]:
    """Yield each module of a model, after the modules that it is part of; nothing inside adapters but their base."""
    around = (*around, module)
    if not isinstance(module, BaseTunerLayer):
        yield around
    for name, child in module.named_children():
        if not isinstance(module, BaseTunerLayer) or name == "base_layer":
            yield from _walk(child, around)


def _list_nearest(around: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    """Return the parameters of the innermost module that has any."""
    return next((weights for module in reversed(around) if (weights := _list_weights(module))), [])


def _list_weights_of_tower(around: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    """Return the parameters of the tower of a base model with MoLA that a module is part of."""
    base = next(module for module in around if get_own_routing(module) is not None)
    towers = {id(tower) for tower in find_towers(base).values()}
    return _list_weights(next((module for module in around if id(module) in towers), base))


def _list_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, those of adapters aside."""
    return [weight for part in _walk(module, ()) for weight in part[-1].parameters(recurse=False)]
