"""Normalisation per task: affine and running statistics of an expert's own, started from those of the base."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STATISTICS = ("running_mean", "running_var")
Weights = torch.Tensor | int


class TaskNorm(nn.Module):
    """The affine of a normalisation for each expert, started from the base's.

    With the weights `gamma` of the experts, the output for a sample is `sum_e gamma_e (scale_e * x' + shift_e)`, where
    `x'` is the normalised input.

    Args:
        norm: Normalisation layer of the base, of a kind that `find_kind` knows.
        num_experts: Number of experts.
    """

    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, norm: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.kind = find_kind(norm)
        self.normalises_last = self.kind in ("layer", "rms")
        self.offset = _find_rms_offset(norm) or 0.0
        for name, base_name in (("scale", "weight"), ("shift", "bias")):
            value = getattr(norm, base_name, None)
            own = None if value is None else nn.Parameter(_repeat(value.detach(), num_experts))
            self.register_parameter(name, own)

    def forward(self, norm: Any, x: torch.Tensor, weights: Weights, batch_dim: int = 0) -> torch.Tensor:
        """Normalise a batch.

        Args:
            norm: Normalisation layer of the base.
            x: Its input.
            weights: Expert of the batch, int; expert of each row, int64 `(rows,)`; or weights of the experts, floating
                `(rows, E)` or `(1, E)`.
            batch_dim: Dimension of `x` that has the rows.

        Returns:
            Normalised input, in the type that the base gives.
        """
        scale = self._mix(cast(torch.Tensor, self.scale), weights) + self.offset
        shift = None if self.shift is None else self._mix(self.shift, weights)
        if self.kind == "rms":
            dims = range(x.dim() - norm.weight.dim(), x.dim())
            dtype = torch.promote_types(x.dtype, norm.weight.dtype)
            return (_rms_normalise(norm, x) * _align(scale, x, dims, batch_dim)).to(dtype)
        if isinstance(weights, int) and scale.dtype == x.dtype:
            return self._normalise(norm, x, scale, shift)
        x = self._normalise(norm, x, None, None)
        first = x.dim() - norm.weight.dim() if self.kind == "layer" else 1
        dims = range(first, first + norm.weight.dim())
        output = x * _align(scale, x, dims, batch_dim)
        return (output if shift is None else output + _align(shift, x, dims, batch_dim)).to(x.dtype)

    def _normalise(
        self, norm: Any, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
    ) -> torch.Tensor:
        if self.kind == "group":
            return F.group_norm(x, norm.num_groups, scale, shift, norm.eps)
        if self.kind == "layer":
            return F.layer_norm(x, norm.normalized_shape, scale, shift, norm.eps)
        return F.layer_norm(x.movedim(1, -1), norm.normalized_shape, scale, shift, norm.eps).movedim(-1, 1)

    @staticmethod
    def _mix(values: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return the weighted sum of the experts' values `(E, ...)`: `(...)` for an int, otherwise `(rows, ...)`."""
        if isinstance(weights, int) or not weights.is_floating_point():
            return values[weights]
        return _weigh(weights.to(values.dtype), values.flatten(1)).unflatten(1, values.shape[1:])


class TaskBatchNorm(TaskNorm):
    """Batch norm with affine and running statistics for each expert, started from the base's.

    An expert normalises by the moments of a batch in which each sample counts by its weight for this expert (mode
    normalisation, arXiv 1810.05466); with one-hot weights these are the moments of the samples of a task. The output
    for a sample is the weighted sum over the experts. Both are affine in the input, so one pass over it suffices,
    whatever the number of experts.

    In training, an expert with less than two values per channel in the batch (samples times positions; with soft
    weights, samples count as `(sum gamma)^2 / sum gamma^2`) takes its running statistics and does not move them. The
    statistics do not move either while the adapter does not train.

    Args:
        norm: Batch norm of the base.
        num_experts: Number of experts.
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None

    def __init__(self, norm: nn.Module, num_experts: int) -> None:
        super().__init__(norm, num_experts)
        for name in (*STATISTICS, "num_batches_tracked"):
            value = getattr(norm, name, None)
            if value is not None and value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            self.register_buffer(name, None if value is None else _repeat(value, num_experts))

    def forward(self, norm: Any, x: torch.Tensor, weights: Weights, batch_dim: int = 0) -> torch.Tensor:
        """Normalise a batch.

        Args:
            norm: Batch norm of the base.
            x: Its input `(B, channels, ...)`.
            weights: Expert of the batch, int; expert of each row, int64 `(B,)`; or weights of the experts, floating
                `(B, E)` or `(1, E)`.
            batch_dim: Ignored, because batch norm takes the batch first.

        Returns:
            Normalised input, in its type.
        """
        trains = self.training and (self.scale is None or self.scale.requires_grad)
        if isinstance(weights, int):
            if x.numel() > x.shape[1]:
                return self._normalise_by_one(norm, x, weights, trains)
            weights = torch.tensor([weights], device=x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not weights.is_floating_point():
            weights = F.one_hot(weights, self.num_experts)
        weights = weights.to(dtype)
        if trains or self.running_mean is None:
            mean, var = self._measure(norm, x.to(dtype), weights.expand(len(x), -1), trains)
        else:
            mean, var = self.running_mean.to(dtype), cast(torch.Tensor, self.running_var).to(dtype)
        scale = (var + norm.eps).rsqrt()
        if self.scale is not None:
            scale = scale * self.scale
        shift = -mean * scale
        if self.shift is not None:
            shift = shift + self.shift
        scale, shift = (_spread(_weigh(weights, value.to(dtype)), x) for value in (scale, shift))
        return (x.to(dtype) * scale + shift).to(x.dtype)

    def _normalise_by_one(self, norm: Any, x: torch.Tensor, expert: int, trains: bool) -> torch.Tensor:
        mean, var, batches, scale, shift = (
            None if value is None else value[expert]
            for value in (self.running_mean, self.running_var, self.num_batches_tracked, self.scale, self.shift)
        )
        momentum = norm.momentum
        if mean is not None:
            scale, shift = (None if value is None else value.to(mean.dtype) for value in (scale, shift))
            if trains:
                cast(torch.Tensor, batches).add_(1)
                momentum = 1 / float(cast(torch.Tensor, batches)) if momentum is None else momentum
        return F.batch_norm(x, mean, var, scale, shift, trains or mean is None, momentum or 0.0, norm.eps)

    def _measure(
        self, norm: Any, x: torch.Tensor, weights: torch.Tensor, trains: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of the batch for each expert, `(E, channels)`, and move the running ones."""
        tiny = torch.finfo(x.dtype).tiny
        sizes = weights.sum(0)
        shares = (weights / sizes.clamp_min(tiny)).T
        mean, var = _Moments.apply(x) if x.dim() > 2 else (x, torch.zeros_like(x))
        # Within the samples, and between them around a common centre, which keeps the numbers small.
        centred = mean - mean.mean(0).detach()
        var = _weigh(shares, var + centred.square()) - _weigh(shares, centred).square()
        mean, var = _weigh(shares, mean), var.clamp_min(0)
        if self.running_mean is None:
            return mean, var
        with torch.no_grad():
            values = sizes.square() / weights.square().sum(0).clamp_min(tiny) * x[0, 0].numel()
            enough = (values > 2 - 1e-3)[:, None]
        if trains:
            unbiased = var.detach() * (values / (values - 1).clamp_min(0.5))[:, None]
            self._move(norm, mean.detach(), unbiased, enough)
        # After the move, which does not touch the experts that need them.
        running_mean, running_var = self.running_mean.to(mean.dtype), cast(torch.Tensor, self.running_var)
        return torch.where(enough, mean, running_mean), torch.where(enough, var, running_var.to(var.dtype))

    @torch.no_grad()
    def _move(self, norm: Any, mean: torch.Tensor, var: torch.Tensor, moves: torch.Tensor) -> None:
        batches = cast(torch.Tensor, self.num_batches_tracked)
        batches += moves[:, 0]
        momentum = norm.momentum
        rate = 1 / batches.clamp_min(1)[:, None] if momentum is None else momentum  # None: a mean over all batches
        for name, value in zip(STATISTICS, (mean, var), strict=True):
            running = getattr(self, name)
            running.copy_(torch.where(moves, running + rate * (value - running), running))


def _weigh(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return weighted sums in the type of the values, also where autocast would compute them in half precision."""
    with torch.autocast(values.device.type, enabled=False):
        return weights @ values


class _Moments(torch.autograd.Function):
    """Mean and variance of each sample and channel, whose gradient has the memory layout of the input.

    Those of torch return the gradient in the layout of images one channel after the other, and convolutions in another
    layout then take several times as long; `torch.var_mean` is slow by itself.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dims = list(range(2, x.dim()))
        mean = x.mean(dims)
        ctx.save_for_backward(x, mean)
        return mean, (x - _spread(mean, x)).square().mean(dims)

    @staticmethod
    def backward(ctx: Any, mean_grad: torch.Tensor, var_grad: torch.Tensor) -> torch.Tensor:
        x, mean = ctx.saved_tensors
        positions = x[0, 0].numel()
        slope = var_grad * (2 / positions)
        return x * _spread(slope, x) + _spread(mean_grad / positions - slope * mean, x)


def _spread(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Give values `(B, channels)` the number of dimensions of an input `(B, channels, ...)`."""
    return value.reshape(*value.shape, *[1] * (x.dim() - 2))


# ---- the kinds of normalisation ----


def find_kind(module: nn.Module) -> str | None:
    """Return the kind of a normalisation layer; None for other modules, and for classes that normalise in another way.

    Args:
        module: Module of a base model.

    Returns:
        `"batch"`, `"layer"`, `"channels first"` (a layer norm over dimension 1), `"group"` or `"rms"`.
    """
    forward = type(module).forward
    if isinstance(module, BATCH_NORMS):
        return "batch" if forward is nn.BatchNorm2d.forward else None
    if isinstance(module, nn.LayerNorm):
        if forward is nn.LayerNorm.forward:
            return "layer"
        # As in ConvNeXt.
        return {"channels_first": "channels first", "channels_last": "layer"}.get(getattr(module, "data_format", ""))
    if isinstance(module, nn.GroupNorm):
        return "group" if forward is nn.GroupNorm.forward else None
    return "rms" if _find_rms_offset(module) is not None else None


def _repeat(value: torch.Tensor, num_experts: int) -> torch.Tensor:
    return value[None].repeat(num_experts, *[1] * value.dim())


def _align(value: torch.Tensor, x: torch.Tensor, dims: range, batch_dim: int) -> torch.Tensor:
    """Shape the affine of the batch, `(...)`, or of each row, `(rows, ...)`, to be multiplied with the input."""
    shape = [1] * x.dim()
    for place, dim in enumerate(reversed(dims), 1):
        shape[dim] = value.shape[-place]
    if value.dim() > len(dims):
        shape[batch_dim] = len(value)
    return value.reshape(shape)


def _rms_normalise(norm: Any, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # as torch has it
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, norm.weight.shape, None, eps).to(x.dtype)


_OFFSETS: dict[type, float | None] = {}


def _find_rms_offset(norm: nn.Module) -> float | None:
    """Return `c` of an RMS norm `(c + weight) x / rms(x)`, 0 as in Llama or 1 as in Gemma; None for other modules.

    Args:
        norm: Module of any class. One that may be an RMS norm by its name shows it by its output.
    """
    kind = type(norm)
    weights = dict(norm.named_parameters(recurse=False))
    if list(weights) != ["weight"] or not kind.__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return None
    if kind not in _OFFSETS:
        weight = torch.linspace(0.5, 2, weights["weight"].numel()).reshape(weights["weight"].shape)
        x = 2 * torch.arange(2.0 * weight.numel()).sin().reshape(2, *weight.shape)
        try:
            with torch.no_grad():
                output = torch.func.functional_call(norm, {"weight": weight}, (x,))
            matches = [c for c in (0.0, 1.0) if torch.allclose(output, _rms_normalise(norm, x) * (c + weight))]
        except Exception:  # a class whose call takes other arguments
            matches = []
        _OFFSETS[kind] = matches[0] if matches else None
    return _OFFSETS[kind]
