"""The typed, checked settings of a run that trains a dual encoder."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_dissect.recipe.adapter import read_adapter
from hf_dissect.recipe.balance_rules import balance_conflicts
from hf_dissect.recipe.compare_schema import CompareSection, parse_strategy
from hf_dissect.recipe.data_rules import (
    adapter_conflicts,
    data_conflicts,
    evaluation_conflicts,
    noise_conflicts,
    reading_conflicts,
    zero_shot_conflicts,
)
from hf_dissect.recipe.fields import Faults, RecipeError
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.model_rules import model_conflicts
from hf_dissect.recipe.objective_schema import GscSection, ObjectiveSection
from hf_dissect.recipe.resolution_rules import find_resolution_faults
from hf_dissect.recipe.rules import Fault
from hf_dissect.recipe.schema import (
    STRATEGIES,
    DataSection,
    EvaluationSection,
    ModelSection,
    SelectionSection,
    ZeroShotSection,
)
from hf_dissect.recipe.selection_rules import (
    compare_conflicts,
    gsc_conflicts,
    objective_conflicts,
    option_conflicts,
    reference_conflicts,
    robust_conflicts,
    selection_conflicts,
    twin_conflicts,
)
from hf_dissect.selection.options import USAGE, WITH_REFERENCE

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

_SCORING = ("scoring_image_size", "scoring_patch_dropout", "scoring_exposure", "rescore_every", "reference")


@dataclasses.dataclass
class Recipe(RecipeFile):
    """The settings of a run.

    Attributes:
        name: Name of the run; its folder is `runs/<name>` unless `training.output_dir` names another.
        description: One line.
        model, data, selection, objective, evaluation, compare: The sections, see `hf_dissect.recipe.schema`.
        adapter: `type` (`mola`, `lora` or another type of PEFT) and fields of its configuration; None for no adapter.
        training: Fields of `transformers.TrainingArguments` that the recipe sets.
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

    def _conflicts(self) -> Iterator[Fault]:
        model, data, selection, training = self.model, self.data, self.selection, self.training
        yield from super()._conflicts()
        yield from model_conflicts(model, data, self.evaluation)
        yield from adapter_conflicts(self.adapter, data)
        yield from data_conflicts(data, training)
        yield from reading_conflicts(data)
        yield from balance_conflicts(data, selection, training)
        yield from noise_conflicts(data)
        yield from selection_conflicts(selection, training)
        yield from option_conflicts(selection)
        yield from objective_conflicts(self.objective, selection)
        yield from reference_conflicts(selection, self.compare, data)
        yield from gsc_conflicts(self.objective.gsc, selection, training)
        yield from robust_conflicts(self.objective, training)
        yield from self._resolution_conflicts()
        yield from twin_conflicts(self.objective.gsc, model, self.adapter)
        yield from evaluation_conflicts(self.evaluation, data, training)
        yield from zero_shot_conflicts(self.evaluation.zero_shot, data)
        yield from compare_conflicts(self.compare)

    def _resolution_conflicts(self) -> Iterator[Fault]:
        """Yield the faults of sizes of pictures and dropped patches."""
        repair = self.objective.repair
        settings = {
            "data.image_size": self.data.image_size,
            "model.patch_dropout": self.model.patch_dropout,
            **{f"selection.{name}": getattr(self.selection, name) for name in _SCORING},
            "objective.repair.encoder": None if repair is None else repair.encoder,
        }
        keys = {key.rpartition(".")[2]: key for key in settings}
        values = {name: settings[key] for name, key in keys.items()}
        for name, other, problem in find_resolution_faults(values):
            yield tuple(keys[one] for one in (name, other) if one), problem
        if self.model.patch_dropout and self.model.freeze == "vision":
            yield (
                ("model.patch_dropout", "model.freeze"),
                f"{self.model.patch_dropout} drops nothing in a frozen vision tower, which runs as in evaluation; set "
                "it to 0, or model.freeze to null",
            )

    def with_overrides(self, overrides: Sequence[str]) -> "Recipe":
        """Return a checked copy with some settings replaced, written the way `load` takes them (`RecipeError`)."""
        return self._build(self.to_dict(), f"recipe {self.name}", overrides)

    def with_strategy(self, spec: str) -> "Recipe":
        """Return a checked copy that selects by `spec` (`name` or `name:variant`, a bare name for its first variant).

        Options of this recipe stay where its strategy stays, and its reference model where the strategy reads one.

        Raises:
            RecipeError: The strategy does not fit the recipe, or does not exist (its message lists what is allowed).
        """
        try:
            name, variant = parse_strategy(spec)
        except ValueError as error:
            raise RecipeError(f"recipe {self.name}", [str(error)]) from error
        settings = self.to_dict()
        options = settings["selection"]["options"] if name == self.selection.strategy else {}
        settings["selection"] |= {"strategy": name, "options": options | ({"variant": variant} if variant else {})}
        if name not in WITH_REFERENCE:
            settings["selection"].pop("reference", None)
        if name not in USAGE:  # a baseline that keeps all pairs, or their order
            settings["selection"].pop("usage_penalty", None)
        return self.from_dict(settings, f"recipe {self.name} with {spec}")

    def training_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `hf_dissect.DissectTrainingArguments`, gathered from the sections."""
        arguments = super().training_arguments()
        arguments.setdefault("run_name", Path(self.output_dir).name)  # trackers may refuse a run without a name
        if self.data.image_features and self.data.image_column is None:
            arguments["image_column"] = "image_features"
        if self.selection.strategy not in WITH_REFERENCE:
            arguments["selection_reference"] = None  # of the other strategies of a comparison
        if self.evaluation.batch_size is not None:
            arguments["per_device_eval_batch_size"] = self.evaluation.batch_size
        return arguments
