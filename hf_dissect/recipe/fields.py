"""Reads each setting of a recipe by itself, so that every wrong one is named before anything is loaded."""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_dissect.recipe.schema import TrainingSection
from hf_dissect.settings import describe_problem, find_nearest, list_members, list_settings, show, suggest

_TRAINING_RANGES = {
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
    **{name: declaration.within for name, (_, declaration) in list_settings(TrainingSection).items()},
}
_ALLOWED_IN_TRAINING = f"{', '.join(list_settings(TrainingSection))} and the fields of transformers.TrainingArguments"


class RecipeError(ValueError):
    """A recipe that cannot be used.

    Attributes:
        source: File or name of the recipe.
        faults: All of its faults, each naming the dotted key, the value and what is allowed.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source, self.faults = source, list(faults)
        heading = f"{source}: " if len(self.faults) == 1 else f"{source}: {len(self.faults)} faults\n  "
        super().__init__(heading + "\n  ".join(self.faults))


class Faults:
    """The faults found so far, and the keys they concern.

    Args:
        places: Dotted keys of the recipe by their last part, to suggest one where a key has another section or none.
    """

    def __init__(self, places: Mapping[str, Sequence[str]] | None = None) -> None:
        self.messages: list[str] = []
        self._keys: list[str] = []
        self._places = places or {}

    def add(self, key: str, problem: str) -> None:
        """Note that the setting `key` has a `problem`."""
        self.messages.append(f"{key}: {problem}")
        self._keys.append(key)

    def add_unknown(self, key: str, value: Any, known: Iterable[str], allowed: str = "") -> None:
        """Note a key that does not exist, and no longer check the one that it may have been meant for."""
        section, _, name = key.rpartition(".")
        known = list(known)
        places = [place for place in self._places.get(name, ()) if place != key]
        near = find_nearest(name, known)
        meant = suggest(name, known) or (f"; did you mean {' or '.join(map(repr, places))}?" if places else "")
        allowed = allowed or ", ".join(known) or "none"
        self.add(key, f"unknown key (value {show(value)}); allowed: {allowed}{meant}")
        self._keys += [f"{section}.{near}".lstrip(".")] if near else []

    def add_misplaced(self, key: str, value: Any, place: str) -> None:
        """Note a key whose value belongs to another key, `place`."""
        self.add(key, f"is set by {place} (value {show(value)}); write it there")

    def concern(self, key: str) -> bool:
        """Return whether a fault was found at `key`, above it or below it."""
        return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in self._keys)


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


def entries_of(given: Any, where: str, faults: Faults) -> Iterator[tuple[str, str, Any]]:
    """Yield dotted key, name and value of each setting of the section `where`; only a mapping has settings."""
    if isinstance(given, dict):
        yield from ((f"{where}.{name}", name, value) for name, value in given.items())
    elif given is not None:  # null: a section whose lines are all commented out
        faults.add(where, f"{show(given)} is not allowed; allowed: a mapping of settings")


def read_section(
    section: type, given: Any, where: str, faults: Faults, elsewhere: Mapping[str, str] | None = None
) -> Any:
    """Return an instance of the dataclass `section` from the mapping `given`; what is faulty keeps its default.

    Args:
        section: A dataclass of settings.
        given: Plain data.
        where: Dotted key of the section.
        faults: Receives unknown keys, wrong types and impossible values.
        elsewhere: Key that sets a trainer argument, by the argument; a setting of that name belongs there.
    """
    known, elsewhere, values = list_settings(section), elsewhere or {}, {}
    for key, name, value in entries_of(given, where, faults):
        if name in elsewhere and name not in known:
            faults.add_misplaced(key, value, elsewhere[name])
            continue
        if name not in known:
            faults.add_unknown(key, value, known)
            continue
        expected, declaration = known[name]
        nested = [item for item in list_members(expected) if isinstance(item, type) and dataclasses.is_dataclass(item)]
        if nested and value is not None:
            values[name] = read_section(nested[0], value, key, faults)
        elif faults.concern(key):
            continue
        elif problem := describe_problem(value, expected, declaration.choices, declaration.within):
            faults.add(key, problem)
        else:
            values[name] = value
    return section(**values)


@functools.cache
def training_fields() -> dict[str, tuple[Any, Any, tuple]]:
    """Return type, default and choices of each field of `transformers.TrainingArguments` and of our own, by name."""
    from transformers import TrainingArguments  # imports torch: only when a recipe is really read

    return {
        field.name: (hints[field.name], field.default, tuple(field.metadata.get("choices", ())))
        for section in (TrainingArguments, TrainingSection)
        for hints in (typing.get_type_hints(section),)
        for field in dataclasses.fields(section)
        if field.init
    }


def training_value(training: Mapping[str, Any], name: str) -> Any:
    """Return a setting of the section `training`, or its default."""
    return training.get(name, training_fields()[name][1])


def read_training(given: Any, faults: Faults, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Return the sound entries of the section `training`; the others go to `faults`.

    Args:
        given: Plain data.
        faults: Receives the faults.
        elsewhere: Key that sets a trainer argument, by the argument.
    """
    known, sound = training_fields(), {}
    for key, name, value in entries_of(given, "training", faults):
        if name in elsewhere:
            faults.add_misplaced(key, value, elsewhere[name])
            continue
        if name == "hub_token":
            faults.add(key, "a recipe is saved with the run and must hold no secret; use `hf auth login` or HF_TOKEN")
            continue
        if name not in known:
            faults.add_unknown(key, value, known, _ALLOWED_IN_TRAINING)
            continue
        expected, _, choices = known[name]
        if faults.concern(key):
            continue
        if problem := describe_problem(value, expected, choices, _TRAINING_RANGES.get(name, "")):
            faults.add(key, problem)
        else:
            sound[name] = value
    return sound
