"""The typed, checked settings of a run that trains a dual encoder."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_dissect.recipe.adapter import read_adapter
from hf_dissect.recipe.fields import ARGUMENT_SOURCES, Faults, RecipeError
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.rules import find_conflicts
from hf_dissect.recipe.schema import (
    STRATEGIES,
    CompareSection,
    DataSection,
    EvaluationSection,
    GscSection,
    ModelSection,
    ObjectiveSection,
    SelectionSection,
    ZeroShotSection,
    parse_strategy,
)

__all__ = [
    "STRATEGIES",
    "CompareSection",
    "DataSection",
    "EvaluationSection",
    "GscSection",
    "ModelSection",
    "ObjectiveSection",
    "Recipe",
    "RecipeError",
    "SelectionSection",
    "ZeroShotSection",
    "parse_strategy",
]


@dataclasses.dataclass
class Recipe(RecipeFile):
    """The settings of a run.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless `training.output_dir` says otherwise.
        description: one line.
        model, data, selection, objective, evaluation, compare: the sections, see `hf_dissect.recipe.schema`.
        adapter: `type` (`mola`, `lora` or another type of PEFT) and fields of its configuration; None for no adapter.
        training: fields of `transformers.TrainingArguments` as given.
    """

    name: str
    description: str = ""
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    adapter: dict[str, Any] | None = None
    data: DataSection = dataclasses.field(default_factory=DataSection)
    selection: SelectionSection = dataclasses.field(default_factory=SelectionSection)
    objective: ObjectiveSection = dataclasses.field(default_factory=ObjectiveSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    compare: CompareSection = dataclasses.field(default_factory=CompareSection)

    MEANT_FOR_OTHERS = {
        "distillation": "makes this the recipe of a distillation, which only `hf-dissect train` carries out"
    }

    @classmethod
    def _readers(cls) -> dict[str, Callable[[Any, Faults], Any]]:
        return {"adapter": read_adapter}

    def _conflicts(self) -> Iterator[tuple[Sequence[str], str]]:
        return find_conflicts(self)

    def with_overrides(self, overrides: Sequence[str]) -> "Recipe":
        """A checked copy with some settings replaced, written as for `load` (`RecipeError`)."""
        return self._build(self.to_dict(), f"recipe {self.name}", overrides)

    def with_strategy(self, spec: str) -> "Recipe":
        """A checked copy that selects by `spec` (`name` or `name:variant`; a bare name means its first variant).

        Options of this recipe stay where its strategy stays.

        Raises:
            RecipeError: the strategy does not fit the recipe, or does not exist (its message lists what is allowed).
        """
        try:
            name, variant = parse_strategy(spec)
        except ValueError as error:
            raise RecipeError(f"recipe {self.name}", [str(error)]) from error
        settings = self.to_dict()
        options = settings["selection"]["options"] if name == self.selection.strategy else {}
        settings["selection"] |= {"strategy": name, "options": options | ({"variant": variant} if variant else {})}
        return self.from_dict(settings, f"recipe {self.name} with {spec}")

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `hf_dissect.DissectTrainingArguments`, gathered from the sections."""
        arguments = copy.deepcopy(self.training) | {"output_dir": self.output_dir}
        arguments.setdefault("run_name", Path(self.output_dir).name)  # in trackers, which may need a name to go on
        settings = self.to_dict()
        for argument, key in ARGUMENT_SOURCES.items():
            section, name = key.split(".")
            arguments[argument] = settings[section][name]
        if self.data.image_features and self.data.image_column is None:
            arguments["image_column"] = "image_features"
        if self.evaluation.batch_size is not None:
            arguments["per_device_eval_batch_size"] = self.evaluation.batch_size
        return arguments
