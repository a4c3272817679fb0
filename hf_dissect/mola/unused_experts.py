"""Experts that a step does not use stay as they are, though optimisers see one parameter of all experts."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# In the order in which they were made, which is the same in all processes of a distributed run.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = count()
# A list for each optimiser, because the step of a subclass may call that of its parent, with hooks of its own.
_steps: weakref.WeakKeyDictionary[Optimizer, list[list[_Unused]]] = weakref.WeakKeyDictionary()
# Memory of the copies, kept for the next step: on a CPU, new memory takes longer than copying.
_memory: weakref.WeakKeyDictionary[Optimizer, _Memory] = weakref.WeakKeyDictionary()
# What the optimisers of torch and transformers begin with zeros, and weight decay may change at once.
_STARTS_AT_ZERO = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta")
}
_DEPTH = 4
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_unused_experts(layer: nn.Module) -> None:
    """Let optimisers leave the experts of a layer alone in the steps that do not use them.

    One parameter holds all experts, so an expert of a `grad` adapter that no sample of a step belongs to gets a
    gradient of zero, not None. Weight decay and momentum would move it nevertheless. A hook before `step()` of every
    optimiser in the process therefore finds the experts whose gradients are exactly zero in all layers of their
    adapter. A hook after it puts back their weights and their part of the optimiser's state: all tensors with a row
    for each expert, such as `exp_avg`, `momentum_buffer` and the factors of Adafactor. Experts that are used move
    exactly as without the hooks. Gradients may be accumulated, scaled, averaged over processes (DDP) or sharded
    (FSDP2).

    What the experts of a parameter share remains shared. Adam counts its steps once for each parameter, so the bias
    correction of an expert that is first used late is about 1 already, and its first steps are smaller than those of
    a new parameter. State that is not held in plain floating-point rows (optimisers of 8 bits) cannot be put back in
    part; then the weights stay, the state does not, and a warning says so. FSDP1 flattens the parameters: nothing is
    put back, and a warning says so, too.

    Args:
        layer: A tuner layer with the attribute `routing`, whose adapters may change later.
    """
    number = next(_numbers)
    if not number:
        # Not traced by a compiled step: which experts are used is known from the values of the gradients only.
        register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
        register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
    _layers[number] = layer


class _Memory:
    """Copies of rows, in memory that is used again."""

    def __init__(self) -> None:
        self.free: dict[Any, list[torch.Tensor]] = {}

    def take(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of some rows of a tensor."""
        if tensor.device.type != "cpu":  # whose allocator keeps memory itself
            return tensor.index_select(0, rows)
        free = self.free.get((tensor.shape, tensor.dtype))
        whole = free.pop() if free else torch.empty_like(tensor)
        return torch.index_select(tensor, 0, rows, out=whole.narrow(0, 0, rows.shape[0]))

    def give_back(self, copy: torch.Tensor) -> None:
        """Use the memory of a copy again."""
        if (whole := copy._base) is not None:
            self.free.setdefault((whole.shape, whole.dtype), []).append(whole)


def list_layers(routing: Any) -> Iterable[Any]:
    """Return the layers of a routing that have weights for experts, in the order in which they were made."""
    return (layer for layer in list(_layers.values()) if layer.routing is routing and hasattr(layer, "mola_A"))


@dataclass
class _Unused:
    """The unused experts in one parameter, as they were before the step; in this process's part if it is sharded."""

    parameter: nn.Parameter
    rows: torch.Tensor
    weights: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    keeps_state: bool = True

    def put_back(self, optimizer: Optimizer, memory: _Memory) -> None:
        _local(self.parameter).index_copy_(0, self.rows, self.weights)
        memory.give_back(self.weights)
        if not self.keeps_state:
            return
        state = optimizer.state.get(self.parameter, {})
        if not _can_keep(state):
            _warn_of_packed_state(optimizer)
            return
        for key, value in state.items():
            if _has_rows(value, self.parameter):
                if key in self.state:
                    _local(value).index_copy_(0, self.rows, self.state[key])
                    memory.give_back(self.state[key])
                elif key in _STARTS_AT_ZERO:  # made in this step
                    _local(value).index_fill_(0, self.rows, 0)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if not _layers:
        return None
    unused: list[_Unused] = []
    steps = _steps.setdefault(optimizer, [])
    steps.append(unused)
    del steps[:-_DEPTH]  # a step that raised an error leaves its list behind
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        unused.extend(_set_aside(optimizer))
        return None
    # The gradients are made within the step.
    closure = _set_aside_after(closure, optimizer, unused)
    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})


def _set_aside_after(closure: Callable, optimizer: Optimizer, unused: list[_Unused]) -> Callable:
    @functools.wraps(closure)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        if not unused:
            unused.extend(_set_aside(optimizer))
        return loss

    return wrapped


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    if steps := _steps.get(optimizer):
        for unused in steps.pop():
            unused.put_back(optimizer, _memory[optimizer])


# ---- before the step ----


@dataclass
class _Adapter:
    num_experts: int
    parameters: list[nn.Parameter]


@torch.no_grad()
def _set_aside(optimizer: Optimizer) -> list[_Unused]:
    """Copy what the step must not change."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in own for layer in _layers.values() for _, parameter in _list_parameters(layer)):
        _warn_of_flat_parameters(optimizer)
        return []
    adapters = [adapter for adapter in _list_adapters() if any(id(weight) in own for weight in adapter.parameters)]
    memory = _memory.setdefault(optimizer, _Memory())
    offsets: dict[Any, int] = {}
    used = [_find_used(adapter, offsets, memory) for adapter in adapters]
    _agree(adapters, used)
    unused = []
    for adapter, is_used in zip(adapters, used, strict=True):
        rows: dict[Any, torch.Tensor] = {}
        for parameter in adapter.parameters:
            if id(parameter) in own and not all(is_used):
                weight, first = _local(parameter), _first_row(parameter, offsets)
                key = (weight.device, first, len(weight))
                if key not in rows:
                    local = [row for row in range(len(weight)) if not is_used[first + row]]
                    rows[key] = torch.tensor(local, dtype=torch.int64, device=weight.device)
                if len(rows[key]):
                    unused.append(_copy(optimizer, parameter, rows[key], memory))
    return unused


def _list_parameters(layer: Any) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield the parameters of a layer's experts with the names of their adapters, the last first."""
    for attribute in reversed(layer.adapter_layer_names):
        held = getattr(layer, attribute)
        yield from held._parameters.items()
        for name, module in held._modules.items():  # such as an affine and a shift
            yield from ((name, parameter) for parameter in module.parameters())


def _list_adapters() -> list[_Adapter]:
    """Return the `grad` adapters of the process with their parameters that have a gradient, the last layers first.

    Of a layer, `B` comes first: at the start `A` has no gradient, as `B` is zero.
    """
    adapters: dict[tuple[int, str], _Adapter] = {}
    for layer in reversed(list(_layers.values())):
        for name, parameter in _list_parameters(layer):
            config = layer.routing.mola_config.get(name)
            if config is None or config.variant != "grad" or parameter.grad is None:
                continue
            adapter = adapters.setdefault((id(layer.routing), name), _Adapter(config.num_experts, []))
            if parameter.shape[0] == config.num_experts:
                adapter.parameters.append(parameter)
            else:
                _warn_of_flat_parameters(None)
    return list(adapters.values())


def _find_used(adapter: _Adapter, offsets: dict[Any, int], memory: _Memory) -> list[bool]:
    """Return for each expert True if a gradient in this process is not zero.

    A few gradients mostly suffice, so only what is still open is looked for in the rest. That costs three transfers
    from the device at most.
    """
    used = [False] * adapter.num_experts
    gradients = [
        (_local(cast(torch.Tensor, weight.grad)), _first_row(weight, offsets)) for weight in adapter.parameters
    ]
    gradients = [(gradient, first) for gradient, first in gradients if gradient.numel()]
    held = {first + row for gradient, first in gradients for row in range(len(gradient))}
    begin, size = 0, 1
    while begin < len(gradients) and (missing := [expert for expert in held if not used[expert]]):
        part = gradients[begin : begin + size]
        flags = [_find_rows(gradient, first, missing, len(used), memory) for gradient, first in part]
        for expert in torch.stack([flag.to(flags[0].device) for flag in flags]).any(0).nonzero().flatten().tolist():
            used[expert] = True
        begin, size = begin + size, 8 if begin == 0 else len(gradients)
    return used


def _find_rows(
    gradient: torch.Tensor, first: int, experts: list[int], num_experts: int, memory: _Memory
) -> torch.Tensor:
    """Return for each of all experts True if it is one of some experts and its row of a gradient is not zero."""
    rows = torch.tensor(
        [expert - first for expert in experts if first <= expert < first + len(gradient)], device=gradient.device
    )
    flags = torch.zeros(num_experts, dtype=torch.bool, device=gradient.device)
    if len(rows):
        # Without the sign, a number is zero if its bits are; that is found much faster than by comparing numbers.
        copy = memory.take(gradient, rows)
        flags[rows + first] = copy.abs_().view(_BITS[copy.element_size()]).flatten(1).amax(1) != 0
        memory.give_back(copy)
    return flags


def _agree(adapters: list[_Adapter], used: list[list[bool]]) -> None:
    """Let an expert count as used in all processes among which the parameters are divided if it is in one."""
    meshes: dict[Any, list[int]] = {}
    for i, adapter in enumerate(adapters):
        mesh = next((weight.device_mesh for weight in adapter.parameters if isinstance(weight, DTensor)), None)
        if mesh is not None:
            meshes.setdefault(mesh, []).append(i)
    for mesh, members in meshes.items():
        device = torch.device(mesh.device_type)
        flags = torch.tensor([flag for i in members for flag in used[i]], dtype=torch.int32, device=device)
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        whole = iter(flags.bool().tolist())
        for i in members:
            used[i] = [next(whole) for _ in used[i]]


def _copy(optimizer: Optimizer, parameter: nn.Parameter, rows: torch.Tensor, memory: _Memory) -> _Unused:
    unused = _Unused(parameter, rows, memory.take(_local(parameter), rows))
    state = optimizer.state.get(parameter, {})
    if not _can_keep(state):
        _warn_of_packed_state(optimizer)
        unused.keeps_state = False
        return unused
    for key, value in state.items():
        if _has_rows(value, parameter):
            unused.state[key] = memory.take(_local(value), rows)
    return unused


# ---- tensors ----


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _first_row(tensor: torch.Tensor, offsets: dict[Any, int]) -> int:
    """Return the expert that the first row of this process's part of a tensor belongs to."""
    if not isinstance(tensor, DTensor):
        return 0
    key = (tensor.device_mesh, tensor.placements, tensor.shape)
    if key not in offsets:
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        offsets[key] = offset[0]
    return offsets[key]


def _has_rows(value: Any, parameter: nn.Parameter) -> bool:
    """Return True if a value of the optimiser's state has a row for each expert, where the parameter has it."""
    if not torch.is_tensor(value) or not value.dim() or isinstance(value, DTensor) != isinstance(parameter, DTensor):
        return False
    return value.shape[0] == parameter.shape[0] and _local(value).shape[0] == _local(parameter).shape[0]


def _can_keep(state: dict[Any, Any]) -> bool:
    """Return True if no tensor of an optimiser's state packs several numbers, or is scaled by another tensor."""
    values = [_local(value) for value in state.values() if torch.is_tensor(value) and value.dim()]
    return all(
        value.is_floating_point() and value.element_size() > 1 and not is_traceable_wrapper_subclass(value)
        for value in values
    )


# ---- warnings ----


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _warn_of_packed_state(optimizer: Optimizer) -> None:
    _warn_once(
        f"{type(optimizer).__name__} packs its state, so that the part of an expert that a step does not use cannot "
        "be kept: its weights stay, but its momentum decays."
    )


def _warn_of_flat_parameters(optimizer: Optimizer | None) -> None:
    groups: Iterable[dict[str, Any]] = optimizer.param_groups if optimizer is not None else []
    if optimizer is None or any(hasattr(weight, "_is_flat_param") for group in groups for weight in group["params"]):
        _warn_once(
            "FSDP1 flattens the experts of MoLA: weight decay and momentum move experts that a step does not use. Use "
            "FSDP2 (fsdp_version: 2) instead."
        )
