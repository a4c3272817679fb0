"""The calls of a model: which experts are in force in each, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(eq=False)
class Pass:
    """One call of a model, or of a tower by itself, and the experts in force in it.

    Args:
        owner: Module that was called.
        weights: Weights `(B, E)` of a router, by adapter and tower.
        projections: Projected scores `(B, decorrelation_dim)` of a router, by adapter and tower.
        task_ids: Tasks of the samples, int64 `(B,)`.
        common_task: Task of all samples, if they are known to share one.
        masks: What a router may see of an input `(B, L)`, by tower; None for all of it.
        tower: Tower that runs now.
        size: Number of samples; None if no input is a tensor.
        device: Device of the inputs.
        held: True if the weights are those of an earlier call, whose prompt or encoder this call continues.
        reentrant: True if layers run again in checkpoints that are reentrant.
    """

    owner: nn.Module | None = None
    weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    projections: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    task_ids: torch.Tensor | None = None
    common_task: int | None = None
    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    tower: str | None = None
    size: int | None = None
    device: torch.device | None = None
    held: bool = False
    reentrant: bool = False

    def hold(self, earlier: Pass) -> None:
        """Use the weights of an earlier call, which this call continues."""
        self.weights = {key: self.expand(weights) for key, weights in earlier.weights.items()}
        self.projections, self.held = earlier.projections, True

    def expand(self, rows: torch.Tensor) -> torch.Tensor:
        """Repeat the row of each sample for its beams, if there are several of each."""
        if self.size is None or self.size <= len(rows) or self.size % len(rows):
            return rows
        return rows.repeat_interleave(self.size // len(rows), dim=0)


class _ThreadState:
    def __init__(self) -> None:
        self.current: Pass | None = None  # that runs
        self.last: Pass | None = None  # that ended, for whoever asks for its scores
        self.generation: Pass | None = None  # what all steps of `generate` share
        self.task_ids: torch.Tensor | None = None  # given to a PEFT model that does not pass them on


class _Threads(threading.local):
    # The state is an object of its own, because a compiled model does not set attributes of a `threading.local`.
    def __init__(self) -> None:
        self.state = _ThreadState()


class Passes:
    """The pass of each thread, and those whose backward pass runs.

    A choice of experts holds for one call: threads do not see each other's, and a layer that is called by itself sees
    none. Checkpoints run layers once more in the backward pass of a call, where its choice is in force again. A copy
    starts without any.
    """

    def __init__(self) -> None:
        self._threads = _Threads()
        self._in_backward: dict[int, Pass] = {}  # by the number that autograd gives a backward pass
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what a later call continues -> its pass

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()

    @property
    def thread(self) -> _ThreadState:
        """The state of this thread."""
        return self._threads.state

    @property
    def current(self) -> Pass | None:
        """The pass that runs, or whose backward pass does; None between calls."""
        running = self.thread.current
        if running is None and (generated := self.generated) is not None:
            return generated  # `generate` calls parts of a model by themselves, too
        if running is not None or torch.compiler.is_compiling() or not self._in_backward:
            return running
        number = torch._C._current_graph_task_id()
        if number == -1:
            return None
        passes = list(self._in_backward.values())
        # A reentrant checkpoint inside another one runs in a backward pass of its own.
        return self._in_backward.get(number, passes[0] if len(passes) == 1 else None)

    @property
    def generated(self) -> Pass | None:
        """The choice that the steps of a generation share; None outside of one, and before its prompt is routed."""
        generation = self.thread.generation
        return generation if generation is not None and generation.weights else None

    def begin(self, new: Pass) -> None:
        """Start a pass in this thread."""
        self.thread.current = new

    def end(self, owner: nn.Module, output: Any) -> None:
        """End the pass of this module, if it has one, and put its choice in force in its backward pass.

        Args:
            owner: Module that returned.
            output: What it returned.
        """
        ended = self.thread.current
        if ended is None or ended.owner is not owner:
            return
        self.thread.current, self.thread.last = None, ended
        ended.owner = None
        if (generation := self.thread.generation) is not None and not generation.weights:
            generation.weights = ended.weights
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in tree_leaves(output):
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._begin_backward, ended))

    def _begin_backward(self, ended: Pass, gradient: torch.Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number not in self._in_backward:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._in_backward.pop, number, None))
        self._in_backward[number] = ended

    # ---- calls that continue an earlier one ----

    @contextmanager
    def generation(self, task_ids: torch.Tensor | None) -> Iterator[Pass]:
        """Share one choice of experts among the calls in the block, that of the first.

        Args:
            task_ids: Tasks of the samples, int64 `(B,)`.
        """
        before, self.thread.generation = self.thread.generation, Pass(task_ids=task_ids)
        try:
            yield self.thread.generation
        finally:
            self.thread.generation = before

    @contextmanager
    def given(self, task_ids: torch.Tensor | None) -> Iterator[None]:
        """Hand tasks to the calls in the block.

        Args:
            task_ids: Tasks of the samples, int64 `(B,)`.
        """
        before, self.thread.task_ids = self.thread.task_ids, task_ids
        try:
            yield
        finally:
            self.thread.task_ids = before

    def remember(self, key: object, made_by: Pass | None) -> None:
        """Keep the choice of a pass for calls that are given what it made, a cache or an encoder's output."""
        if made_by is not None and made_by.weights:
            self._known[key] = Pass(weights=made_by.weights, projections=made_by.projections)

    def find(self, key: object) -> Pass | None:
        """Return the pass that a call with this object continues; None for one that is not known."""
        return self._known.get(key)
