"""Checks the section `adapter` of a recipe against the configuration of its PEFT type, before anything is loaded."""

import dataclasses
import difflib
import typing
import warnings
from typing import Any

from hf_dissect.recipe.fields import Faults, problem_with, show


def read_adapter(given: Any, faults: Faults) -> dict[str, Any] | None:
    """The sound entries of the section `adapter`, None where there is no adapter; the others go to `faults`.

    `type` names a type of PEFT, such as `mola` or `lora`; everything else are fields of its configuration.
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
    if kind not in list(types):  # whatever it is, hashable or not
        near = difflib.get_close_matches(str(kind), types, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        problem = "missing" if kind is None else f"{show(kind)} is not allowed"
        faults.add("adapter.type", f"{problem}; allowed: {', '.join(sorted(types))}{meant}")
        return None
    hints = _hints(types[kind])
    sound = {"type": kind}
    for name, value in given.items():
        key = f"adapter.{name}"
        if name == "type" or faults.concern(key):
            continue
        if name in SET_BY_THE_RUN:
            faults.add(key, f"is set by the run (value {show(value)}); leave it out")
        elif name not in hints:
            faults.add_unknown(key, value, hints)
        elif problem := problem_with(value, hints[name]):
            faults.add(key, problem)
        else:
            sound[name] = value
    if not faults.concern("adapter"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said again when the adapter is made
                adapter_config(sound)
        except (ValueError, TypeError, ImportError) as error:
            faults.add("adapter", str(error))
    return sound


def _hints(config: type) -> dict[str, Any]:
    """Name -> type of the fields that a recipe may set."""
    from hf_dissect.models.adapters import SET_BY_THE_RUN

    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: hints[name] for name in names if name not in SET_BY_THE_RUN}
