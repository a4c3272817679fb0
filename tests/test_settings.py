"""Each setting is declared once: recipes, trainer arguments, their help and their docstrings say the same."""

import dataclasses
import typing
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dissect import DissectTrainingArguments
from hf_dissect.distillation import DistillationRecipe, DistillationTrainingArguments
from hf_dissect.objectives.gsc import GscObjective
from hf_dissect.objectives.rince import RinceObjective
from hf_dissect.objectives.symnce import SymnceObjective
from hf_dissect.recipe import Recipe, RecipeError
from hf_dissect.recipe.objective_schema import GscSection, RinceSection, SymnceSection
from hf_dissect.recipe.schema import TrainingSection
from hf_dissect.selection.options import OPTIONS
from hf_dissect.settings import describe_problem, find_setting, list_members, list_settings

KINDS = {
    "selection": (Recipe, DissectTrainingArguments),
    "distillation": (DistillationRecipe, DistillationTrainingArguments),
}
RECIPES = {
    Recipe: {"name": "small", "model": {"config": {"model_type": "clip"}}, "training": {"max_steps": 5}},
    DistillationRecipe: {
        "name": "small",
        "student": {"column": "depth", "config": {"model_type": "frame_sequence_encoder"}},
        "auxiliaries": {"skeleton": {"config": {"model_type": "sequence_encoder"}}},
        "data": {"path": "x"},
    },
}
# Values other than the defaults, for the round trip from a recipe to the arguments.
OTHER = {
    "data.image_size": 112,
    "selection.options": {"momentum": 0.25},
    "model.caption_lengths": [8, 16],
    "selection.ledger": "hub:somebody/scores",
    "objective.gsc": {"beta": 0.25},
    "objective.rince": {"q": 0.25, "lam": 0.25, "temperature": None, "warmup_epochs": 0},
    "objective.symnce": {"beta": 0.25, "temperature": None, "warmup_epochs": 0},
    "objective.noisy_channel": {},
    "distillation.term_weights": {"hinton": 0.25},
}


def own_fields(arguments: type) -> list[dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [field for field in dataclasses.fields(arguments) if field.name not in inherited]


def sections_of(recipe: type) -> dict[str, type]:
    """Every section of a recipe by its dotted key, nested ones too."""
    found = {"training": TrainingSection}  # next to the fields of transformers

    def visit(key: str, section: type) -> None:
        found[key] = section
        for name, (expected, _) in list_settings(section).items():
            for member in list_members(expected):
                if dataclasses.is_dataclass(member):
                    visit(f"{key}.{name}", member)

    for field in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(field.type):
            visit(field.name, field.type)
    return found


def with_value(recipe: type, key: str, value: Any) -> dict:
    """A sound recipe but for the setting `key`."""
    settings = {name: dict(part) if isinstance(part, dict) else part for name, part in RECIPES[recipe].items()}
    *path, name = key.split(".")
    place = settings
    for part in path:
        place = place.setdefault(part, {})
    place[name] = value
    return settings


def limited(recipe: type) -> list[tuple[str, Any]]:
    """Dotted key and an impossible value of each setting with a range or choices, two where the range has two ends."""
    cases = []
    for key, section in sections_of(recipe).items():
        for name, (expected, declaration) in list_settings(section).items():
            values = ["nonsense"] if declaration.choices else []
            if declaration.within:
                low, high = map(float, declaration.within[1:-1].split(","))
                kind = int if int in list_members(expected) or list[int] in list_members(expected) else float
                values += [kind(low) if declaration.within[0] == "(" else kind(low) - 1]
                values += (
                    [] if high == float("inf") else [kind(high) if declaration.within[-1] == ")" else kind(high) + 1]
                )
            cases += [(f"{key}.{name}", [value] if expected == list[int] else value) for value in values]
    return cases


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_has_one_declaration_and_repeats_its_type(kind):
    recipe, arguments = KINDS[kind]
    sources, hints = recipe.argument_sources(), typing.get_type_hints(arguments)
    sections = sections_of(recipe)
    assert own_fields(arguments)
    for field in own_fields(arguments):
        assert find_setting(field) is not None, field.name
        if field.name == "save_run_folder":  # a recipe always writes it
            continue
        section, name = sources.get(field.name, f"training.{field.name}").rsplit(".", 1)
        if field.name == "student_column":  # the same section describes every modality
            continue
        (source,) = (item for item in dataclasses.fields(sections[section]) if item.name == name)
        assert field.metadata["help"] is source.metadata["help"], field.name
        declarations = [
            setting.argument
            for part in sections.values()
            for _, setting in list_settings(part).values()
            if setting.argument == field.name
        ]
        assert len(declarations) == (0 if section in ("distillation", "training") else 1)
        expected, repeated = list_settings(sections[section])[name][0], hints[field.name]
        if field.name in arguments._VALID_DICT_FIELDS:  # also as JSON, from the command line
            assert {dict[str, Any], str} <= set(list_members(repeated)) <= {dict[str, Any], str, type(None)}
        else:
            assert repeated == expected, field.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_is_explained_in_the_docstring_and_in_the_help(kind):
    arguments = KINDS[kind][1]
    documented = " ".join((arguments.__doc__ or "").split())
    shown = " ".join(HfArgumentParser(arguments).format_help().split())
    for field in own_fields(arguments):
        text = field.metadata["help"]
        assert text == find_setting(field).help or text.startswith(f"{find_setting(field).help} Allowed: ")
        assert text.endswith(".") and f" {field.name}: {text}" in documented and f"--{field.name}" in shown
        assert text.replace("-", "").replace(" ", "") in shown.replace("-", "").replace(" ", ""), field.name
    assert "Allowed: a number in" in documented and "Raises:" in documented


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_reaches_its_argument(kind, tmp_path):
    recipe, arguments = KINDS[kind]
    made, changed = recipe.from_dict(RECIPES[recipe]).training_arguments(), {}
    for argument, key in recipe.argument_sources().items():
        if key == "selection.reference":
            continue  # allowed only next to the strategies that read it, see recipe/test_reference.py
        if key in ("objective.division", "objective.repair"):
            continue  # allowed only next to a certain strategy or objective, see objectives/
        if key == "selection.scoring_exposure":
            continue  # allowed only next to the size, see recipe/test_resolution_rules.py
        section, name = key.rsplit(".", 1)
        expected, declaration = list_settings(sections_of(recipe)[section])[name]
        default = made[argument]
        candidates = [OTHER.get(key), *declaration.choices[::-1], not default, "other", 7, 0.75]
        changed[key] = next(
            value
            for value in candidates
            if value not in (None, default)
            and not describe_problem(value, expected, declaration.choices, declaration.within)
        )
        arrived = recipe.from_dict(with_value(recipe, key, changed[key])).training_arguments()
        assert arrived.pop(argument) == changed[key] or key.startswith("objective."), key
        assert arrived == {name: value for name, value in made.items() if name != argument}
        taken = arguments(str(tmp_path), max_steps=5, **{argument: changed[key]})
        assert getattr(taken, argument) == changed[key] or changed[key].items() <= getattr(taken, argument).items()


@pytest.mark.parametrize(
    ("recipe", "arguments", "key", "value"), [(*kind, *case) for kind in KINDS.values() for case in limited(kind[0])]
)
def test_an_impossible_value_gets_the_same_verdict_in_a_recipe_and_in_the_arguments(recipe, arguments, key, value):
    with pytest.raises(RecipeError) as in_recipe:
        recipe.from_dict(with_value(recipe, key, value))
    (fault,) = (fault for fault in in_recipe.value.faults if fault.startswith(f"{key}: "))
    shown = value[0] if isinstance(value, list) else value
    assert fault.startswith(f"{key}: {shown!r} is not allowed; allowed: ")
    own = {field.name for field in own_fields(arguments)}
    given = {name: value for name, source in recipe.argument_sources().items() if source == key and name in own}
    if key.count(".") == 2 and key.startswith("objective."):
        _, objective, name = key.split(".")
        given = {objective: {name: value}}
    if key.startswith("training."):
        given = {key.rpartition(".")[2]: value}
    if given:
        with pytest.raises(ValueError) as in_arguments:
            arguments("unused", **given)
        assert str(in_arguments.value).endswith(f"={fault.partition(': ')[2]}.")


def test_objectives_have_the_defaults_of_their_sections():
    for section, objective in (
        (GscSection, GscObjective),
        (RinceSection, RinceObjective),
        (SymnceSection, SymnceObjective),
    ):
        assert dataclasses.asdict(section()).items() <= vars(objective()).items()


@pytest.mark.parametrize("strategy", OPTIONS)
def test_an_impossible_option_gets_the_same_verdict_in_a_recipe_and_in_the_arguments(strategy):
    for name, (_, declaration) in list_settings(OPTIONS[strategy]).items():
        value = "nonsense" if declaration.choices else -1
        selection = {"strategy": strategy, "options": {name: value}}
        with pytest.raises(RecipeError) as in_recipe:
            Recipe.from_dict(RECIPES[Recipe] | {"selection": selection})
        (fault,) = in_recipe.value.faults
        with pytest.raises(ValueError) as in_arguments:
            DissectTrainingArguments("unused", selection_strategy=strategy, selection_options={name: value})
        assert fault.startswith(f"selection.options.{name}: {value!r} is not allowed; allowed: ")
        assert str(in_arguments.value) == f"{name}={fault.partition(': ')[2]}."


def test_a_setting_under_the_name_of_its_argument_is_sent_to_its_place():
    with pytest.raises(RecipeError, match="distillation.label_column: is set by data.label_column .*; write it there"):
        DistillationRecipe.from_dict(with_value(DistillationRecipe, "distillation.label_column", "x"))
    with pytest.raises(RecipeError, match="training.method: is set by distillation.method"):
        DistillationRecipe.from_dict(with_value(DistillationRecipe, "training.method", "amid"))
    with pytest.raises(RecipeError, match="selection.selection_ratio: is set by selection.ratio"):
        Recipe.from_dict(with_value(Recipe, "selection.selection_ratio", 0.5))


def test_distillation_arguments_from_the_command_line_and_under_their_former_name():
    from hf_dissect.distillation import DistillationTrainingArguments

    words = ["--output_dir", "unused", "--term_weights", '{"hinton": 0.5}', "--temperature", "0.2", "--method", "crd"]
    (taken,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(words)
    assert (
        type(taken) is DistillationTrainingArguments and DistillationTrainingArguments("unused").output_dir == "unused"
    )
    assert (taken.term_weights, taken.temperature, taken.weights.contrastive) == ({"hinton": 0.5}, 0.2, 0.3)
