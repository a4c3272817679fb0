"""Checks each setting of a recipe by itself, so that every wrong one is named before anything is loaded."""

import dataclasses
import difflib
import enum
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

# Arguments of DissectTrainingArguments and the setting each one comes from.
ARGUMENT_SOURCES = {
    "selection_strategy": "selection.strategy",
    "selection_ratio": "selection.ratio",
    "selection_scope": "selection.scope",
    "selection_warmup_epochs": "selection.warmup_epochs",
    "selection_options": "selection.options",
    "initial_ledger": "selection.ledger",
    "mask_false_negatives": "selection.mask_false_negatives",
    "grad_cache_chunk_size": "objective.grad_cache_chunk_size",
    "gsc": "objective.gsc",
    "scoring_batch_size": "selection.scoring_batch_size",
    "record_selection": "selection.record",
    "max_bad_fraction": "selection.max_bad_fraction",
    "image_column": "data.image_column",
    "caption_column": "data.caption_column",
    "id_column": "data.id_column",
    "task_column": "data.task_column",
    "clean_column": "data.clean_column",
    "max_caption_length": "model.max_caption_length",
    "shuffle_buffer": "data.shuffle_buffer",
    "dataloader_num_workers": "data.num_workers",
}
TRAINING_RANGES = {
    "per_device_train_batch_size": "[2, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "num_train_epochs": "(0, inf)",
    "max_steps": "[-1, inf)",
    "learning_rate": "[0, inf)",
    "weight_decay": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "max_grad_norm": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "logging_steps": "(0, inf)",
    "eval_steps": "(0, inf)",
    "save_steps": "(0, inf)",
    "seed": "[0, 4294967295]",
    "data_seed": "[0, 4294967295]",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class RecipeError(ValueError):
    """A recipe that cannot be used.

    Attributes:
        source: the file or name it came from.
        faults: all of its faults, each naming the dotted key, the value and what is allowed.
    """

    def __init__(self, source: str, faults: Sequence[str]):
        self.source, self.faults = source, list(faults)
        heading = f"{source}: " if len(self.faults) == 1 else f"{source}: {len(self.faults)} faults\n  "
        super().__init__(heading + "\n  ".join(self.faults))


class Faults:
    """The faults found so far, and the keys they concern."""

    def __init__(self):
        self.messages: list[str] = []
        self._keys: list[str] = []

    def add(self, key: str, problem: str) -> None:
        """Note that the setting `key` has a `problem`."""
        self.messages.append(f"{key}: {problem}")
        self._keys.append(key)

    def add_unknown(self, key: str, value: Any, known: Iterable[str], allowed: str = "") -> None:
        """Note a key that does not exist; what it may have been meant for is no longer checked either."""
        section, _, name = key.rpartition(".")
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        self.add(key, f"unknown key (value {show(value)}); allowed: {allowed or ', '.join(known)}{meant}")
        self._keys += [f"{section}.{near[0]}".lstrip(".")] if near else []

    def concern(self, key: str) -> bool:
        """Whether a fault was found at `key`, above it or below it."""
        return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in self._keys)


def show(value: Any) -> str:
    """`value` as an error message prints it, long ones cut."""
    return _SHORT.repr(value)


def find_unusable_numbers(value: Any, key: str, faults: Faults) -> None:
    """Note each NaN and infinity anywhere in the plain data `value`."""
    if isinstance(value, dict):
        for name, item in value.items():
            find_unusable_numbers(item, f"{key}.{name}".lstrip("."), faults)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            find_unusable_numbers(item, f"{key}.{position}", faults)
    elif isinstance(value, float) and not math.isfinite(value):
        faults.add(key, f"{value} is not allowed; allowed: a finite number")


def problem_with(value: Any, expected: Any, choices: Sequence = (), within: str = "") -> str | None:
    """What is wrong with a value, in words; None when nothing is.

    Args:
        expected: its declared type, as in an annotation.
        choices: the allowed values, of each element for a list.
        within: the allowed interval such as "(0, 1]", of each element for a list.
    """
    if not _matches(value, expected):
        allowed = ", ".join(map(str, choices)) if choices else _describe(expected)
        return f"{show(value)} is not allowed; allowed: {allowed}"
    for item in value if isinstance(value, list) else [value]:
        if choices and item is not None and item not in choices:
            near = difflib.get_close_matches(str(item), list(choices), n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            return f"{show(item)} is not allowed; allowed: {', '.join(map(str, choices))}{meant}"
        if within and _is_number(item) and not _inside(item, within):
            return f"{show(item)} is not allowed; allowed: {_describe_interval(within)}"
    return None


_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _members(expected: Any) -> tuple:
    """The alternatives of a union. Text beside an enumeration stands for one of its values, hence is none."""
    if typing.get_origin(expected) not in (typing.Union, types.UnionType):
        return (expected,)
    members = typing.get_args(expected)
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        members = tuple(member for member in members if member is not str)
    return members


def _matches(value: Any, expected: Any) -> bool:
    members = _members(expected)
    if len(members) > 1:
        return any(_matches(value, member) for member in members)
    expected = members[0]
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is None or expected is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if expected is list or origin is list:
        return isinstance(value, list) and all(_matches(item, argument) for argument in arguments for item in value)
    if {expected, origin} & {tuple, set}:
        return isinstance(value, list)  # as YAML writes them
    if expected in (float, int):
        # Beyond 2 ** 63 no library of ours can hold it, and float() of it overflows.
        sized = _is_number(value) and (isinstance(value, float) or abs(value) < 2**63)
        return sized and (expected is float or isinstance(value, int))
    if expected in (str, bool):
        return isinstance(value, expected)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return isinstance(value, str) and value in [member.value for member in expected]
    # Everything else (dict, Any, ParallelismConfig, ...) is written as a mapping, or is not ours to judge.
    return expected is Any or isinstance(value, dict)


def _describe(expected: Any) -> str:
    members = _members(expected)
    if len(members) > 1:
        return " or ".join(_describe(member) for member in members)
    expected = members[0]
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return ", ".join(str(member.value) for member in expected)
    if typing.get_origin(expected) is list:
        return f"a list ({_describe(typing.get_args(expected)[0])})"
    if typing.get_origin(expected) is typing.Literal:
        return " or ".join(str(argument).lower() for argument in typing.get_args(expected))
    return _WORDS.get(type(None) if expected is None else expected, "a mapping")


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _describe_interval(interval: str) -> str:
    low, high = (part.strip() for part in interval[1:-1].split(","))
    if high == "inf":
        return f"at least {low}" if interval[0] == "[" else f"more than {low}"
    return f"a number in {interval}"


def read_section(section: type, given: Any, where: str, faults: Faults) -> Any:
    """An instance of the dataclass `section` from the mapping `given`; what is faulty keeps its default.

    Args:
        where: the dotted key of the section.
        faults: receives unknown keys, wrong types and impossible values.
    """
    if given is None:  # a section whose lines are all commented out
        given = {}
    if not isinstance(given, dict):
        faults.add(where, f"{show(given)} is not allowed; allowed: a mapping of settings")
        return section()
    fields = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    values = {}
    for name, value in given.items():
        key = f"{where}.{name}"
        if name not in fields:
            faults.add_unknown(key, value, fields)
            continue
        nested = [member for member in _members(hints[name]) if dataclasses.is_dataclass(member)]
        if nested and value is not None:
            values[name] = read_section(nested[0], value, key, faults)
            continue
        metadata = fields[name].metadata
        if faults.concern(key):
            continue
        if problem := problem_with(value, hints[name], metadata["choices"], metadata["within"]):
            faults.add(key, problem)
        else:
            values[name] = value
    return section(**values)


@functools.cache
def training_fields() -> dict[str, tuple[Any, Any, tuple]]:
    """Name -> (type, default, choices) of each field of `transformers.TrainingArguments`."""
    from transformers import TrainingArguments  # imports torch: only when a recipe is really read

    hints = typing.get_type_hints(TrainingArguments)
    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init]
    return {
        field.name: (hints[field.name], field.default, tuple(field.metadata.get("choices", ()))) for field in fields
    }


def read_training(given: Any, faults: Faults) -> dict[str, Any]:
    """The sound entries of the section `training`; the others go to `faults`."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        faults.add("training", f"{show(given)} is not allowed; allowed: a mapping of settings")
        return {}
    known, sound = training_fields(), {}
    for name, value in given.items():
        key = f"training.{name}"
        if name in ARGUMENT_SOURCES:
            faults.add(key, f"is set by {ARGUMENT_SOURCES[name]} (value {show(value)}); write it there")
        elif name == "hub_token":
            faults.add(key, "a recipe is saved with the run and must hold no secret; use `hf auth login` or HF_TOKEN")
        elif name not in known:
            faults.add_unknown(key, value, known, "the fields of transformers.TrainingArguments")
        elif faults.concern(key):
            continue
        elif problem := problem_with(value, known[name][0], known[name][2], TRAINING_RANGES.get(name, "")):
            faults.add(key, problem)
        else:
            sound[name] = value
    return sound
