"""State that a checkpoint holds next to the Trainer's files, so that a resumed run equals an uninterrupted one."""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState, TrainingArguments

from hf_dissect.distributed import Ranks
from hf_dissect.training.earlier_state import FORMAT, upgrade

logger = logging.getLogger(__name__)

STATE_FILE = "dissect_state.json"
TENSORS_FILE = "dissect_state.safetensors"
_TENSOR = "tensor of"
"""Key of the mapping that takes the place of a tensor in the JSON file."""


class Stateful(Protocol):
    """Object whose state of plain data and tensors can be saved and loaded, by methods named as in torch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; every rank calls this method."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class Joinable(Stateful, Protocol):
    """Object whose states on several ranks can be joined."""

    def join_states(self, states: Sequence[dict[str, Any]], rank: int = 0) -> dict[str, Any]:
        """Join the states of all ranks to the state of one of them."""


JoinableT = TypeVar("JoinableT", bound=Joinable)


@dataclass(frozen=True)
class Part:
    """Part of a run whose state is saved.

    Args:
        stateful: Object that holds the state.
        each_rank: True to save the state of each rank; False to save that of the first rank for all.
        join: Function from the states of all ranks and the own rank to the state to load, for a checkpoint of another
            number of processes; None to load no state then.
    """

    stateful: Stateful
    each_rank: bool = False
    join: Callable[[list[dict[str, Any]], int], dict[str, Any] | None] | None = None


@dataclass(frozen=True)
class SavedState:
    """State in a checkpoint.

    Attributes:
        candidates_per_update: Number of candidates of an optimiser step, on all ranks.
        parts: States by name, of the parts that are the same on all ranks.
        ranks: States by name for each rank, of the parts that differ.
    """

    candidates_per_update: int
    parts: dict[str, dict[str, Any]]
    ranks: list[dict[str, dict[str, Any]]]


def save_state(folder: str | Path, parts: Mapping[str, Part], args: TrainingArguments, ranks: Ranks) -> None:
    """Write the state of all parts to a checkpoint; every rank calls this function.

    Args:
        folder: Folder of the checkpoint.
        parts: Parts by name.
        args: Arguments of the run.
        ranks: Processes of the run.
    """
    # On all ranks, because a part may have to gather what is split over them.
    states = {name: part.stateful.state_dict() for name, part in parts.items()}
    everyone = ranks.gather_objects({name: states[name] for name, part in parts.items() if part.each_rank})
    if not args.should_save:
        return
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "format": FORMAT,
        "candidates_per_update": count_candidates(args, ranks),
        "parts": {name: states[name] for name, part in parts.items() if not part.each_rank},
        "ranks": everyone,
    }
    Path(folder, STATE_FILE).write_text(json.dumps(_without_tensors(state, "", tensors)), encoding="utf-8")
    save_file(tensors, Path(folder, TENSORS_FILE))


def read_state(folder: str | Path) -> SavedState | None:
    """Read the state in a checkpoint of this version or an earlier one; None for a checkpoint without it.

    Raises:
        ValueError: A later version wrote the state.
    """
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*_state.safetensors"):
        tensors |= load_file(file)
    if "format" not in state:
        state = upgrade(state, tensors)
    elif state["format"] != FORMAT:
        raise ValueError(
            f"{path} has the form {state['format']}, and this version reads forms up to {FORMAT}; resume with the "
            "version of hf_dissect that wrote it, or a later one."
        )
    state = _with_tensors(state, tensors)
    return SavedState(state["candidates_per_update"], state["parts"], state["ranks"])


def restore_state(saved: SavedState, parts: Mapping[str, Part], ranks: Ranks) -> None:
    """Load a saved state into the parts of a run.

    Args:
        saved: State of the checkpoint, possibly of another number of processes.
        parts: Parts by name; those without a saved state are left unchanged.
        ranks: Processes of the run.
    """
    for name, part in parts.items():
        if not part.each_rank:
            state = saved.parts.get(name)
        else:
            states = [rank[name] for rank in saved.ranks if rank.get(name) is not None]
            if len(saved.ranks) == ranks.count:
                state = saved.ranks[ranks.own].get(name)
            else:
                state = part.join(states, ranks.own) if part.join is not None and states else None
        if state is not None:
            part.stateful.load_state_dict(state)


def count_candidates(args: TrainingArguments, ranks: Ranks) -> int:
    """Return the number of candidates of an optimiser step, on all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * ranks.count


def join_over_ranks(counts: JoinableT, ranks: Ranks) -> JoinableT:
    """Return a copy of an object with the joined state of all ranks; every rank calls this function."""
    joined = copy.copy(counts)
    joined.load_state_dict(counts.join_states(ranks.gather_objects(counts.state_dict())))
    return joined


def find_moved_step(
    saved: SavedState | None, state: TrainerState, args: TrainingArguments, ranks: Ranks, steps_per_epoch: int
) -> int | None:
    """Find the step to resume at if the number of candidates of a step has changed, and warn of the change.

    Args:
        saved: State of the checkpoint; None for a checkpoint without it.
        state: State of the Trainer, read from the checkpoint.
        args: Arguments of the run.
        ranks: Processes of the run.
        steps_per_epoch: Number of optimiser steps of an epoch now.

    Returns:
        Step at the epoch of the checkpoint; None to resume at the step of the checkpoint.
    """
    if saved is None:
        return None
    before, now = saved.candidates_per_update, count_candidates(args, ranks)
    if len(saved.ranks) != ranks.count:
        logger.warning(
            "The checkpoint was written by %d processes, this run has %d: the history of the pairs is kept, and "
            "training continues statistically as the same run, not bit for bit.",
            *(len(saved.ranks), ranks.count),
        )
    if before == now:
        return None
    if args.max_steps > 0:
        logger.warning(
            "A step looked at %d candidates and now looks at %d; max_steps counts steps, so training continues at "
            "step %d.",
            *(before, now, state.global_step),
        )
        return None
    step = round(state.epoch * steps_per_epoch)
    logger.warning(
        "A step looked at %d candidates and now looks at %d: training continues at the same epoch, %.2f, which is now "
        "step %d (it was step %d). The learning rate was meant for the other batch.",
        *(before, now, state.epoch, step, state.global_step),
    )
    return step


def move_schedule(schedule: Any, before: int, step: int) -> None:
    """Move the schedule of the learning rate of a resumed run, if the run resumes at another step.

    Args:
        schedule: Schedule; None for an optimiser without one.
        before: Step of the checkpoint.
        step: Step to resume at.
    """
    if step != before and schedule is not None:
        schedule.last_epoch = step - 1
        schedule.step()


def _without_tensors(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return plain data for JSON, and move its tensors to `tensors`, named by their place."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        return {key: _without_tensors(part, f"{place}/{key}".lstrip("/"), tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, f"{place}/{number}", tensors) for number, part in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    return [_with_tensors(part, tensors) for part in value] if isinstance(value, list) else value
