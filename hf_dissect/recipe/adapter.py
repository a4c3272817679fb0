"""Checks the section `adapter` of a recipe against the configuration of its PEFT type, before anything is loaded."""

import dataclasses
import typing
import warnings
from typing import Any

from hf_dissect.recipe.fields import Faults
from hf_dissect.settings import describe_problem, show, suggest


def read_adapter(given: Any, faults: Faults) -> dict[str, Any] | None:
    """Return the sound entries of the section `adapter`, None for no adapter; the others go to `faults`.

    `type` names a type of PEFT, such as `mola` or `lora`; all other entries are fields of its configuration.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        faults.add("adapter", f"{show(given)} is not allowed; allowed: a mapping of settings, or null for no adapter")
        return None
    from hf_dissect.models.adapters import (  # imports torch: only where needed
        SET_BY_THE_RUN,
        adapter_config,
        adapter_types,
    )

    types, kind = adapter_types(), given.get("type")
    if kind not in list(types):  # a list: the value may not be hashable
        what = "missing" if kind is None else f"{show(kind)} is not allowed"
        faults.add("adapter.type", f"{what}; allowed: {', '.join(sorted(types))}{suggest(kind, types)}")
        return None
    hints = _hints(types[kind])
    sound: dict[str, Any] = {"type": kind}
    for name, value in given.items():
        key = f"adapter.{name}"
        if name == "type" or faults.concern(key):
            continue
        if name in SET_BY_THE_RUN:
            faults.add(key, f"is set by the run (value {show(value)}); leave it out")
        elif name not in hints:
            faults.add_unknown(key, value, hints)
        elif problem := describe_problem(value, hints[name]):
            faults.add(key, problem)
        else:
            sound[name] = value
    if not faults.concern("adapter"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come again when the adapter is made
                adapter_config(sound)
        except (ValueError, TypeError, ImportError) as error:
            faults.add("adapter", str(error))
    return sound


def _hints(config: type) -> dict[str, Any]:
    """Return the type of each field that a recipe may set, by name."""
    from hf_dissect.models.adapters import SET_BY_THE_RUN

    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: hints[name] for name in names if name not in SET_BY_THE_RUN}
