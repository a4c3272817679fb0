"""Mean of the weights over the last optimiser steps of a run, which becomes its final model."""

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.training.non_finite import NonFiniteLossError
from hf_dissect.training.training_args import BaseTrainingArguments

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")
"""Buffers that are averaged like weights; all other buffers keep their last value."""


class AveragedWeights(TrainerCallback):
    """Callback that averages the weights of the last optimiser steps, and makes their mean the final model.

    This is stochastic weight averaging (arXiv 1803.05407) with the weights of each step, as in latest weight averaging
    (arXiv 2209.14981). With `average_weights=x`, the mean is that of the steps after `(1 - x) * max_steps`. In
    training, nothing changes.

    Averaged are the weights that train, at least in float32: a frozen base takes no memory, and a tied weight counts
    once. So are the running means and variances of batch norm where it trains, because each belongs to the weights of
    its time; their mean belongs to the mean of the weights, as the last ones do not. Other buffers, such as counters
    or the vectors of a spectral norm, have no meaningful mean and keep their last value. Of a model that is split by
    FSDP2, each process averages its part.

    Args:
        args: Arguments of the run; without `average_weights`, the callback does nothing.
        accelerator: Accelerator of the run.
        optimizer: Optimiser that the user passed; None for that of the arguments.

    Raises:
        ValueError: The run cannot average its weights.
    """

    def __init__(self, args: BaseTrainingArguments, accelerator: Accelerator, optimizer: Any = None) -> None:
        self._args = args
        self._parameters: dict[str, nn.Parameter] = {}
        self._statistics: dict[str, nn.Module] = {}  # module of each buffer that may be averaged
        self._means: dict[str, torch.Tensor] = {}
        self._start = self._step = 0  # the last step that is not averaged, and the last step that ended
        self._model: nn.Module | None = None
        self._loaded: Mapping[str, Any] = {}
        self._applied: dict[str, int] = {}
        if args.average_weights is not None:
            _check_setup(args.average_weights, accelerator, optimizer)

    # ---- in training ----

    @torch.no_grad()
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin a mean, or continue that of the checkpoint."""
        loaded, self._loaded = self._loaded, {}
        self._means, self._applied = {}, {}
        share = self._args.average_weights
        if share is None or model is None:
            return
        self._start, self._step = find_start(share, state.max_steps), state.global_step
        self._model = model
        _reshard(model)
        self._parameters = dict(model.named_parameters())
        self._statistics = {
            f"{prefix}.{name}".lstrip("."): module
            for prefix, module in model.named_modules()
            for name in STATISTICS
            if isinstance(module._buffers.get(name), torch.Tensor) and name not in module._non_persistent_buffers_set
        }
        # Now and not at the first step that is averaged, so that a lack of memory shows at once.
        self._add_means([name for name, weight in self._parameters.items() if weight.requires_grad])
        if self._step > self._start:
            self._restore_means(loaded.get("means", {}))

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the mean of what trains now and did not before; until now, it was its present value."""
        if self._args.average_weights is None or state.global_step < self._start:
            return
        trained = [name for name, weight in self._parameters.items() if weight.requires_grad]
        # While a layer is frozen, its forward pass takes it out of training mode.
        self._add_means([*trained, *(name for name, module in self._statistics.items() if module.training)])

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the weights of a step to the mean."""
        self._step = state.global_step
        if not self._means or self.num_steps == 0:
            return
        means = [_get_own_part(mean) for mean in self._means.values()]
        weights = [_get_own_part(self._get(name)) for name in self._means]
        weights = [weight.to(mean.dtype) for weight, mean in zip(weights, means, strict=True)]
        get_swa_multi_avg_fn()(means, weights, self.num_steps - 1)

    @property
    def num_steps(self) -> int:
        """Number of steps that are averaged so far."""
        return max(self._step - self._start, 0)

    def _get(self, name: str) -> torch.Tensor:
        module = self._statistics.get(name)
        # A layer may replace the buffer itself, so that no reference to it lasts.
        return self._parameters[name] if module is None else cast(torch.Tensor, getattr(module, name.split(".")[-1]))

    def _add_means(self, names: list[str]) -> None:
        for name in (name for name in names if name not in self._means):
            value = self._get(name).detach()
            self._means[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)

    # ---- the end ----

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the weights of the model by their mean, and free its memory."""
        share = self._args.average_weights
        if share is None or not self._means or self._model is None:
            return
        if self.num_steps == 0:
            logger.warning(
                "average_weights=%s averages from step %d on, and training ended after step %d: the model has the "
                "last weights.",
                *(share, self._start + 1, self._step),
            )
        else:
            _reshard(self._model)
            for name, mean in self._means.items():
                _get_own_part(self._get(name)).copy_(_get_own_part(mean))
            self._applied = {"steps": self.num_steps, "first_step": self._start + 1}
        self._means, self._model = {}, None

    def describe(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`: number of averaged steps and the first of them; empty without a mean."""
        return {"averaged_weights": self._applied} if self._applied else {}

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Return the mean so far; with FSDP2, it is gathered from all processes.

        Raises:
            NonFiniteLossError: A part of the mean is not finite.
        """
        if not self._means or self.num_steps == 0:
            return {}
        means = {name: mean.full_tensor() if isinstance(mean, DTensor) else mean for name, mean in self._means.items()}
        if wrong := [name for name, mean in means.items() if not torch.isfinite(mean).all()]:
            raise NonFiniteLossError(
                f"After step {self._step} the mean of {len(wrong)} weights is not finite (first: "
                f"{', '.join(wrong[:3])}), as they were not at a step since step {self._start + 1}; it is not saved. "
                "Resume from the last checkpoint with a smaller learning rate, a longer learning-rate warm-up, or "
                "max_grad_norm."
            )
        return {"start": self._start, "step": self._step, "means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the mean of a checkpoint until training begins."""
        self._loaded = state

    def check_resumed(self, state: TrainerState, checkpoint_step: int, checkpoint: str) -> None:
        """Check that a checkpoint holds the mean of all steps that this run averages.

        Args:
            state: State of the Trainer, at the step to resume at.
            checkpoint_step: Step of the checkpoint, another one if the number of candidates of a step has changed.
            checkpoint: Folder of the checkpoint.

        Raises:
            ValueError: It does not; the message names the ways out.
        """
        share, step = self._args.average_weights, state.global_step
        start = 0 if share is None else find_start(share, state.max_steps)
        if share is None or step <= start:
            self._loaded = {}  # of a run that averaged from an earlier step on
            return
        # A step that looks at another number of candidates counts as this many of the checkpoint.
        factor = step / checkpoint_step
        saved = self._loaded.get("start")
        if saved is not None and abs(saved * factor - start) < max(factor, 1):
            return
        self._loaded = {}
        held = "no mean of them" if saved is None else f"their mean from step {saved + 1} on"
        largest = math.floor((1 - step / state.max_steps) * 1000) / 1000
        raise ValueError(
            f"average_weights={share} (training.average_weights in a recipe) averages the weights of "
            f"{state.max_steps} steps from step {start + 1} on, but {checkpoint}, of step {step}, holds {held}. "
            f"Resume with the settings of the run that wrote it, from a checkpoint before step {start + 1}, or "
            "without average_weights" + (f"; or set it to at most {largest}." if largest > 0 else ".")
        )

    def _restore_means(self, saved: Mapping[str, torch.Tensor]) -> None:
        # A scalar has a dimension while the model is split.
        shapes = {name: _list_sizes(self._get(name)) for name in (*self._parameters, *self._statistics)}
        if wrong := [name for name, mean in saved.items() if _list_sizes(mean) != shapes.get(name)]:
            raise ValueError(
                f"The checkpoint holds the mean of other weights than those of the model ({', '.join(wrong[:3])}); "
                "resume with the settings of the run that wrote it, or without average_weights."
            )
        self._add_means(list(saved))
        for name, mean in saved.items():
            own = self._means[name]
            mean = mean.to(own.device, own.dtype).reshape(own.shape)
            if isinstance(own, DTensor):
                mean = distribute_tensor(mean, own.device_mesh, own.placements)
            _get_own_part(own).copy_(_get_own_part(mean))


def find_start(share: float, max_steps: int) -> int:
    """Return the number of steps before those that are averaged, `(1 - share) * max_steps` or the step below it.

    Args:
        share: Share of the steps that are averaged.
        max_steps: Number of steps of the run.
    """
    # Rounded, because 0.07 * 100 is more than 7.
    return max_steps - max(math.ceil(round(share * max_steps, 6)), 1)


def _check_setup(share: float, accelerator: Accelerator, optimizer: Any) -> None:
    unfit = {
        "DeepSpeed, which keeps weights of full precision to itself": accelerator.distributed_type
        == DistributedType.DEEPSPEED,
        "FSDP of version 1": accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2,
    }
    for name in (name for name, used in unfit.items() if used):
        raise ValueError(
            f"average_weights={share} cannot be used with {name}; use DDP or FSDP2 (fsdp_version: 2), or leave "
            "average_weights out."
        )
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"average_weights={share} cannot be used with {type(optimizer).__name__}, which changes the weights for "
            "evaluation itself; leave average_weights out, or choose another optimiser."
        )


def _list_sizes(tensor: torch.Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _get_own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(model: nn.Module) -> None:
    """Give up whole copies of split weights, which FSDP2 keeps after an evaluation and would not renew."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()
