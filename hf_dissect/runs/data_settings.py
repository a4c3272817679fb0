"""Settings of the data, such as a separator, that a command or a call sets for the data that it names."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from hf_dissect.distillation.schema import DistillationDataSection
from hf_dissect.recipe.data_rules import data_conflicts, noise_conflicts, reading_conflicts
from hf_dissect.recipe.fields import Faults, RecipeError, read_section
from hf_dissect.recipe.file import apply_overrides
from hf_dissect.recipe.recipe import DataSection
from hf_dissect.recipe.rules import Fault
from hf_dissect.settings import show

Section = TypeVar("Section", DataSection, DistillationDataSection)

_WITHOUT_EFFECT = {
    "num_workers": "use --num-workers",
    "shuffle_buffer": "it is for training",
    "image_size": "it is for training, and pictures have the model's own size here",
    "fast_decoding": "it is for training and its validation, pictures are decoded whole here",
    "max_train_rows": "use --max-rows",
    "max_eval_rows": "use --max-rows",
    "max_bad_fraction": "rows that cannot be read are left out",
}
"""Settings that only training reads, and the way out."""


def parse_data_settings(overrides: Sequence[str], command: str) -> dict[str, Any]:
    """Parse settings of a command line.

    Args:
        overrides: Each `data.key=value`, the value in YAML.
        command: Name of the command, for errors.

    Returns:
        Values by the name of their setting in the data section of a recipe.

    Raises:
        RecipeError: They are written otherwise, or are not about the data.
    """
    settings: dict[str, Any] = {}
    faults = Faults()
    apply_overrides(settings, overrides, faults)
    data = settings.pop("data", {})
    for name, value in settings.items():
        key = f"{name}.{next(iter(value))}" if isinstance(value, Mapping) and value else name
        faults.add(key, f"not a setting of {command}; allowed: settings of the data, such as data.separator=';'")
    if not isinstance(data, Mapping):
        faults.add("data", f"{show(data)} is not allowed; allowed: data.key=value, such as data.separator=';'")
    if faults.messages:
        raise RecipeError(command, faults.messages)
    return dict(data)


def change_data(
    section: Section,
    settings: Mapping[str, Any] | None,
    *,
    named: bool,
    options: Mapping[str, Any] | None = None,
    refused: Mapping[str, str] | None = None,
) -> Section:
    """Return a data section with some settings changed, checked as those of a recipe are.

    Args:
        section: Data section of a recipe of any kind, or that of data that were named.
        settings: New values by name; None for none.
        named: True if the data were named, so that no setting may name others.
        options: Values of options for settings of the same name; None for one that is not given.
        refused: Settings that would have no effect, and the way out.

    Raises:
        RecipeError: A setting is unknown, impossible, without effect, or given twice.
    """
    if not settings:
        return section
    faults, options = Faults(), options or {}
    reasons = {**_WITHOUT_EFFECT, **(refused or {})}
    if named:
        reasons |= {"path": "the data are named already (--data, --fit)"}
    for name, value in settings.items():
        if name in reasons:
            faults.add(f"data.{name}", f"{show(value)} has no effect here: {reasons[name]}")
        elif options.get(name) is not None:
            option = "--" + name.replace("_", "-")
            faults.add(f"data.{name}", f"{show(value)} and {option} {options[name]} are both set; keep one")
    changed = read_section(type(section), {**dataclasses.asdict(section), **settings}, "data", faults)
    for keys, problem in _list_conflicts(changed):
        if not any(map(faults.concern, keys)):
            faults.add(keys[0], problem)
    if faults.messages:
        raise RecipeError("settings of the data", faults.messages)
    return changed


def refuse_for_arrays(settings: Mapping[str, Any] | None, data: str) -> None:
    """Refuse settings of the data for a file of arrays, which has nothing to set.

    Raises:
        RecipeError: There are some.
    """
    if settings:
        problems = [
            f"data.{name}: {show(value)} has no effect on the arrays of {data}" for name, value in settings.items()
        ]
        raise RecipeError("settings of the data", problems)


def _list_conflicts(data: DataSection | DistillationDataSection) -> Iterator[Fault]:
    if isinstance(data, DataSection):
        yield from data_conflicts(data, {"max_steps": 1})  # nothing trains, so that a stream needs no number of steps
        yield from reading_conflicts(data)
        yield from noise_conflicts(data)
