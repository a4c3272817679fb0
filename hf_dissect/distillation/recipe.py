"""The typed, checked settings of a distillation: a recipe with a section `distillation`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from hf_dissect.distillation.earlier_versions import restore_earlier_settings
from hf_dissect.distillation.schema import DistillationDataSection, DistillationSettings, ModalitySection
from hf_dissect.distillation.terms import METHODS
from hf_dissect.recipe.fields import Faults, read_section
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.rules import Fault, model_source_conflicts
from hf_dissect.settings import show

__all__ = ["DistillationDataSection", "DistillationRecipe", "DistillationSettings", "ModalitySection"]


@dataclasses.dataclass
class DistillationRecipe(RecipeFile):
    """The settings of a distillation.

    Attributes:
        name: Name of the run; its folder is `runs/<name>` unless `training.output_dir` names another.
        description: One line.
        student: The modality that inference has.
        auxiliaries: The modalities that only training has, by column.
        data: The source of the rows.
        distillation: Objective, networks and diagnostics.
        training: Fields of `transformers.TrainingArguments` that the recipe sets.
    """

    name: str
    description: str = ""
    student: ModalitySection = dataclasses.field(default_factory=ModalitySection)
    auxiliaries: dict[str, ModalitySection] = dataclasses.field(default_factory=dict)
    data: DistillationDataSection = dataclasses.field(default_factory=DistillationDataSection)
    distillation: DistillationSettings = dataclasses.field(default_factory=DistillationSettings)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def _build(cls, settings: dict[str, Any], source: str, overrides: Sequence[str]) -> Self:
        return super()._build(restore_earlier_settings(settings), source, overrides)

    @classmethod
    def argument_sources(cls) -> dict[str, str]:
        """Return the dotted key that sets a trainer argument, by the argument."""
        own = {field.name: f"distillation.{field.name}" for field in dataclasses.fields(DistillationSettings)}
        return super().argument_sources() | own | {"student_column": "student.column"}

    @classmethod
    def _readers(cls) -> dict[str, Callable[[Any, Faults], Any]]:
        return {"auxiliaries": _read_auxiliaries}

    def _conflicts(self) -> Iterator[Fault]:
        yield from super()._conflicts()
        yield from (((f"distillation.{name}",), problem) for name, problem in self.distillation.conflicts())
        yield from _encoder_conflicts(self.student, self.auxiliaries, self.distillation.method)
        yield from _data_conflicts(self.data)
        data = self.data
        has_validation = data.validation_groups if data.group_column else data.validation_split
        if self.training.get("eval_strategy", "no") != "no" and not has_validation:
            problem = "needs validation rows (data.validation_groups or validation_split)"
            yield ("training.eval_strategy", "data.validation_groups", "data.validation_split"), problem

    def modalities(self) -> dict[str, ModalitySection]:
        """Return the section of each modality, by column, the student's first."""
        return {self.student.column or "": self.student, **self.auxiliaries}  # a checked recipe names the column


def _read_auxiliaries(given: Any, faults: Faults) -> dict[str, ModalitySection]:
    if not isinstance(given, dict):
        faults.add("auxiliaries", f"{show(given)} is not allowed; allowed: a mapping of columns to encoders")
        return {}
    sections = {}
    for name, value in given.items():
        section = read_section(ModalitySection, value, f"auxiliaries.{name}", faults)
        column = str(name) if section.column is None else section.column
        if column in sections:
            faults.add(f"auxiliaries.{name}.column", f"{show(column)} is there twice; allowed: each column once")
        sections[column] = dataclasses.replace(section, column=column)
    return sections


def _encoder_conflicts(
    student: ModalitySection, auxiliaries: dict[str, ModalitySection], method: str
) -> Iterator[Fault]:
    if not student.column:
        yield ("student.column",), "missing; name the column of the student's modality"
    if not auxiliaries and method != "student":
        others = ", ".join(name for name in METHODS if name != "student")
        problem = f"missing; {others} learn from at least one (distillation.method)"
        yield ("auxiliaries", "distillation.method"), problem
    if student.column in auxiliaries:
        yield (f"auxiliaries.{student.column}",), "is the student's own column; name another one"
    sections = {"student": student, **{f"auxiliaries.{name}": section for name, section in auxiliaries.items()}}
    for where, section in sections.items():
        yield from model_source_conflicts(where, section.name_or_path, section.config, "encoder", "sequence_encoder")


def _data_conflicts(data: DistillationDataSection) -> Iterator[Fault]:
    if not data.path:
        yield ("data.path",), f"missing; data.source {data.source} needs one (data.path=...)"
    for name in ("separator", "encoding", "image_root"):
        if data.source == "npz" and getattr(data, name) is not None:
            problem = f"{show(getattr(data, name))} is only for tables, not for data.source npz; leave it out"
            yield (f"data.{name}", "data.source"), problem
    groups = {name: getattr(data, f"{name}_groups") for name in ("train", "validation", "test")}
    if data.group_column is None:
        for name, values in groups.items():
            if values:
                yield (f"data.{name}_groups",), "needs data.group_column"
        if data.source == "npz":
            problem = "missing; arrays are one table, to be split by the values of a column"
            yield ("data.group_column", "data.source"), problem
    elif not groups["train"]:
        yield ("data.train_groups",), "missing; name the values of data.group_column that are trained on"
    seen: dict[Any, str] = {}
    for name, values in groups.items():
        for value in values:
            if seen.setdefault(value, name) != name:
                problem = f"{show(value)} is among data.{seen[value]}_groups, too; allowed: one of them"
                yield (f"data.{name}_groups",), problem
