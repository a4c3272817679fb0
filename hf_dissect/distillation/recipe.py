"""Turns a YAML file with a section `distillation` into the typed, checked settings of a run."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hf_dissect.distillation.terms import METHODS
from hf_dissect.distillation.training_args import OWN_FIELDS, distillation_problems
from hf_dissect.recipe.fields import Faults, read_section, show
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.schema import setting

KINDS = ("array", "image", "text")
_ELSEWHERE = {
    "student_column": "student.column",
    "label_column": "data.label_column",
    "max_bad_fraction": "data.max_bad_fraction",
    "save_run_folder": "none: a recipe always writes it",
}
_DISTILLATION = [name for name in OWN_FIELDS if name not in _ELSEWHERE]


@dataclasses.dataclass
class ModalitySection:
    """A modality and its encoder."""

    column: str | None = setting(None, "Column of the data; null: the name of the section (of an auxiliary).")
    kind: str = setting("array", "What the column holds.", choices=KINDS)
    name_or_path: str | None = setting(None, "Hub id or folder of a trained encoder; this or config.")
    config: dict[str, Any] | None = setting(
        None, "Configuration (with model_type) of an encoder trained from scratch; this or name_or_path."
    )
    processor: str | None = setting(
        None, "Hub id or folder of the image processor or tokenizer; null: the encoder's own, or one made here."
    )
    standardise: bool = setting(
        True, "Whether arrays are standardised by the training data (encoders with input_mean and input_std)."
    )
    trust_remote_code: bool = setting(False, "Whether code from the encoder's repository may run.")


@dataclasses.dataclass
class DistillationDataSection:
    """Where the rows come from, and which of them belong to which split."""

    source: str = setting("folder", "What kind of data it is.", choices=("npz", "folder", "hub", "imagefolder"))
    path: str | None = setting(None, "File or folder of arrays (.npz), folder of tables, or Hub id.")
    name: str | None = setting(None, "Configuration of a Hub dataset.")
    label_column: str = setting("label", "Column of the classes.")
    train_split: str = setting("train", "Split that is trained on.")
    validation_split: str | None = setting("validation", "Split evaluated during training; null: there is none.")
    test_split: str | None = setting("test", "Split of the final figures; null: there is none.")
    group_column: str | None = setting(
        None, "Column by whose values one table is split, such as the subject; null: the data are split."
    )
    train_groups: list[Any] = setting([], "Values of group_column that are trained on.")
    validation_groups: list[Any] = setting([], "Values evaluated during training.")
    test_groups: list[Any] = setting([], "Values of the final figures.")
    max_train_rows: int | None = setting(None, "Train on the first rows only.", within="[1, inf)")
    max_eval_rows: int | None = setting(None, "Evaluate on the first rows only.", within="[1, inf)")
    max_bad_fraction: float = setting(0.01, "Share of unusable rows above which the run stops.", within="[0, 1]")
    num_workers: int = setting(0, "Processes that decode and tokenise.", within="[0, inf)")


@dataclasses.dataclass
class DistillationRecipe(RecipeFile):
    """The settings of a distillation.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless `training.output_dir` says otherwise.
        description: one line.
        student: the modality that inference has.
        auxiliaries: those that only training has, by column.
        data: where the rows come from.
        distillation: fields of `AuxiliaryDistillationArguments`, such as `method`.
        training: fields of `transformers.TrainingArguments` as given.
    """

    name: str
    description: str = ""
    student: ModalitySection = dataclasses.field(default_factory=ModalitySection)
    auxiliaries: dict[str, ModalitySection] = dataclasses.field(default_factory=dict)
    data: DistillationDataSection = dataclasses.field(default_factory=DistillationDataSection)
    distillation: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def _readers(cls) -> dict[str, Callable[[Any, Faults], Any]]:
        return {"auxiliaries": _read_auxiliaries, "distillation": _read_distillation}

    def _conflicts(self) -> Iterator[tuple[Sequence[str], str]]:
        return (([key], problem) for key, problem in _conflicts(self))

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `AuxiliaryDistillationArguments`, gathered from the sections."""
        return {
            **self.training,
            **self.distillation,
            "output_dir": self.output_dir,
            "student_column": self.student.column,
            "label_column": self.data.label_column,
            "max_bad_fraction": self.data.max_bad_fraction,
            "dataloader_num_workers": self.data.num_workers,
        }

    def modalities(self) -> dict[str, ModalitySection]:
        """Section by column, the student's first."""
        return {self.student.column: self.student, **self.auxiliaries}


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


def _read_distillation(given: Any, faults: Faults) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, dict):
        faults.add("distillation", f"{show(given)} is not allowed; allowed: a mapping of settings")
        return {}
    sound = {}
    for name, value in given.items():
        if name in _ELSEWHERE:
            faults.add(f"distillation.{name}", f"is set by {_ELSEWHERE[name]} (value {show(value)}); write it there")
        elif name not in _DISTILLATION:
            faults.add_unknown(f"distillation.{name}", value, _DISTILLATION)
        else:
            sound[name] = value
    for name, problem in distillation_problems(sound):
        faults.add(f"distillation.{name}", problem)
    return sound


def _conflicts(recipe: DistillationRecipe) -> Iterator[tuple[str, str]]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        problem = f"{show(recipe.name)} is not allowed" if recipe.name else "missing"
        yield "name", f"{problem}; allowed: letters, digits, '.', '_' and '-' (the run's folder is named so)"
    if len(recipe.description.splitlines()) > 1:
        yield "description", f"{show(recipe.description)} is not allowed; allowed: one line"
    yield from _encoders(recipe)
    yield from _data(recipe)
    if recipe.training.get("bf16") and recipe.training.get("fp16"):
        yield "training.fp16", "true is not allowed together with training.bf16; set one to false"


def _encoders(recipe: DistillationRecipe) -> Iterator[tuple[str, str]]:
    if not recipe.student.column:
        yield "student.column", "missing; name the column of the student's modality"
    if not recipe.auxiliaries and recipe.distillation.get("method", "amid") != "student":
        others = ", ".join(name for name in METHODS if name != "student")
        yield "auxiliaries", f"missing; {others} learn from at least one (distillation.method)"
    if recipe.student.column in recipe.auxiliaries:
        yield f"auxiliaries.{recipe.student.column}", "is the student's own column; name another one"
    sections = {"student": recipe.student}
    sections |= {f"auxiliaries.{name}": section for name, section in recipe.auxiliaries.items()}
    for where, section in sections.items():
        if bool(section.name_or_path) == (section.config is not None):
            yield f"{where}.config", "set one of name_or_path (a trained encoder) and config (from scratch)"
        elif section.config is not None and not isinstance(section.config.get("model_type"), str):
            problem = f"{show(section.config.get('model_type'))} is not allowed"
            yield f"{where}.config.model_type", f"{problem}; allowed: an architecture, such as sequence_encoder"


def _data(recipe: DistillationRecipe) -> Iterator[tuple[str, str]]:
    data = recipe.data
    if not data.path:
        yield "data.path", f"missing; data.source {data.source} needs one (data.path=...)"
    groups = {name: getattr(data, f"{name}_groups") for name in ("train", "validation", "test")}
    if data.group_column is None:
        for name, values in groups.items():
            if values:
                yield f"data.{name}_groups", "needs data.group_column"
        if data.source == "npz":
            yield "data.group_column", "missing; arrays are one table, to be split by the values of a column"
    elif not groups["train"]:
        yield "data.train_groups", "missing; name the values of data.group_column that are trained on"
    seen: dict[Any, str] = {}
    for name, values in groups.items():
        for value in values:
            if seen.setdefault(value, name) != name:
                yield (
                    f"data.{name}_groups",
                    f"{show(value)} is among data.{seen[value]}_groups, too; allowed: one of them",
                )
    has_validation = groups["validation"] if data.group_column else data.validation_split
    if recipe.training.get("eval_strategy", "no") != "no" and not has_validation:
        yield "training.eval_strategy", "needs validation rows (data.validation_groups or validation_split)"
