"""The base of all kinds of recipes: a YAML file that is read, checked and saved."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from hf_dissect.recipe.fields import (
    Faults,
    RecipeError,
    find_unusable_numbers,
    read_section,
    read_training,
)
from hf_dissect.recipe.places import list_places
from hf_dissect.recipe.rules import Fault, run_conflicts
from hf_dissect.recipe.yaml import format_yaml, parse_yaml
from hf_dissect.settings import describe_problem, find_nearest, list_settings, show

MAX_BYTES = 1_000_000


class RecipeFile:
    """The base of recipes, dataclasses whose fields are the keys of the file.

    Fields that are dataclasses are sections. Relative paths in a recipe are relative to the current working directory,
    not to its file.
    """

    name: str
    description: str
    training: dict[str, Any]

    MEANT_FOR_OTHERS: ClassVar[dict[str, str]] = {}
    """The fault of each key that belongs to another kind of recipe."""

    @classmethod
    def load(cls, path_or_shipped_name: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read and check a recipe.

        Args:
            path_or_shipped_name: A YAML file, or the name of a shipped recipe such as `quickstart`;
                `recipes/quickstart.yaml` means the shipped one where there is no such file.
            overrides: Each `section.key=value`, the value in YAML: `selection.options.variant=momentum`.

        Raises:
            RecipeError: The file cannot be read, or has faults; all of them are listed.
        """
        return cls._build(*load_settings(path_or_shipped_name), overrides)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> Self:
        """Check plain settings, nested like the YAML file; `source` names them in errors (`RecipeError`)."""
        return cls._build(copy.deepcopy(settings), source, overrides)

    @classmethod
    def _build(cls, settings: dict[str, Any], source: str, overrides: Sequence[str]) -> Self:
        faults = Faults(list_places(cls.sections()))
        apply_overrides(settings, overrides, faults)
        find_unusable_numbers(settings, "", faults)
        fields = {field.name: field.type for field in cls._fields()}
        sources, sections, readers = cls.argument_sources(), cls.sections(), cls._readers()
        values: dict[str, Any] = {"name": ""}
        for key, value in settings.items():
            if key in cls.MEANT_FOR_OTHERS:
                faults.add(key, cls.MEANT_FOR_OTHERS[key])
            elif key not in fields:
                faults.add_unknown(str(key), value, fields)
            elif key == "training":
                values[key] = read_training(value, faults, sources)
            elif key in readers:
                values[key] = readers[key](value, faults)
            elif key in sections:
                values[key] = read_section(sections[key], value, key, faults, sources)
            elif problem := describe_problem(value, fields[key]):
                faults.add(key, problem)
            else:
                values[key] = value
        recipe = cls(**values)
        for keys, problem in recipe._conflicts():
            if not any(map(faults.concern, keys)):
                faults.add(keys[0], problem)
        if faults.messages:
            raise RecipeError(source, faults.messages)
        return recipe

    @classmethod
    def argument_sources(cls) -> dict[str, str]:
        """Return the dotted key that sets a trainer argument, by the argument."""
        return {
            declaration.argument: f"{key}.{name}"
            for key, section in cls.sections().items()
            for name, (_, declaration) in list_settings(section).items()
            if declaration.argument
        }

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Return the dataclass of each section that is one, by its key."""
        return {
            field.name: field.type
            for field in cls._fields()
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
        }

    @classmethod
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        # The subclasses are dataclasses; the base is not, since its fields would come first in the file.
        return dataclasses.fields(cls)  # type: ignore[arg-type]

    @classmethod
    def _readers(cls) -> dict[str, Callable[[Any, Faults], Any]]:
        """Return the function that checks a section, by its key, for sections that are not dataclasses."""
        return {}

    def _conflicts(self) -> Iterator[Fault]:
        """Yield the faults that a setting has only together with others."""
        yield from run_conflicts(self.name, self.description, self.training)

    @property
    def output_dir(self) -> str:
        """Folder of the run: `training.output_dir`, else `runs/<name>`."""
        return self.training.get("output_dir") or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, defaults included, as plain data in the order of the file."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def training_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the trainer's arguments, gathered from the sections."""
        settings = self.to_dict()
        arguments = settings["training"] | {"output_dir": self.output_dir}
        for argument, key in self.argument_sources().items():
            section, name = key.split(".")
            arguments[argument] = settings[section][name]
        return arguments

    def save(self, path: str | Path, command: str = "train") -> None:
        """Write the complete recipe; `load` reads it back equal. The folder of `path` must exist.

        Args:
            path: Path of the file.
            command: Subcommand that repeats the run, named at the top of the file.
        """
        path = Path(path)
        shown = str(path) if str(path).isprintable() else path.name if path.name.isprintable() else "recipe.yaml"
        header = f"# All settings of a run, defaults included. Repeat it with: hf-dissect {command} {shown}\n"
        path.write_text(header + format_yaml(self.to_dict()), encoding="utf-8")


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each recipe that comes with the package, by name in alphabetical order."""
    installed = Path(__file__).parents[1] / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def read_description(path: str | Path) -> str:
    """Return the description in a recipe's file, the rest unchecked (that would need torch).

    Raises:
        RecipeError: The file cannot be read.
    """
    return str(read_settings(Path(path)).get("description", ""))


def _find(path_or_shipped_name: str | Path) -> Path:
    """Return the file that is meant; a path that does not exist comes back unchanged."""
    path = Path(path_or_shipped_name)
    could_be_shipped = path.suffix in ("", ".yaml") and path.parent in (Path("."), Path("recipes"))
    if could_be_shipped and not path.is_file():
        return shipped_recipes().get(path.stem, path)
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe's file, unchecked.

    Raises:
        RecipeError: The file cannot be read, or is not a mapping.
    """
    content = _read_bytes(path)
    if len(content) > MAX_BYTES:
        raise RecipeError(str(path), [f"is larger than {MAX_BYTES} bytes; a recipe is a small YAML file"])
    try:
        settings = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(str(path), [f"line {line}: not UTF-8 text; a recipe is a YAML file"]) from error
    except ValueError as error:
        raise RecipeError(str(path), [str(error)]) from error
    if settings is None:
        raise RecipeError(str(path), ["is empty; a recipe needs at least a name and a model"])
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise RecipeError(str(path), [f"holds {show(settings)} (a {kind}); a recipe is a mapping of sections"])
    return settings


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file, at most one byte more than allowed."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        shipped = list(shipped_recipes())
        near = find_nearest(path.stem, shipped)
        meant = f"; did you mean {near}?" if near else ""
        raise RecipeError(str(path), [f"no such file; shipped recipes: {', '.join(shipped)}{meant}"]) from error
    except IsADirectoryError as error:
        inside = path / "recipe.yaml"
        meant = f"; did you mean {inside}?" if inside.is_file() else "; a recipe is a YAML file"
        raise RecipeError(str(path), [f"is a folder{meant}"]) from error
    except (OSError, ValueError) as error:  # not permitted, a name too long, a null byte in the name
        raise RecipeError(str(path), [f"cannot be read: {error}"]) from error


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str], faults: Faults) -> None:
    """Set the values that `overrides` (`section.key=value`) name, in place; faults are added."""
    for override in overrides:
        _apply_override(settings, override, faults)


def _apply_override(settings: dict[str, Any], override: str, faults: Faults) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    *sections, name = key.split(".")
    if not equals or not name or not all(sections):
        faults.add(*explain_no_override(override))
        return
    try:
        value = parse_yaml(text)
    except ValueError as error:
        faults.add(key, f"{show(text)} is not a YAML value ({error}); quote text with special characters")
        return
    place: Any = settings
    for depth, section in enumerate(sections):
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            above = ".".join(sections[: depth + 1])
            faults.add(key, f"{above} is {show(place)}, not a mapping; give it as a whole: {above}=...")
            return
    place[name] = value


def explain_no_override(word: str) -> tuple[str, str]:
    """Return the key to blame for a word that is not `section.key=value`, and what is wrong with it."""
    if word.endswith((".yaml", ".yml")):
        return word, f"{show(word)} is a second recipe; a command takes one, so run it once for each"
    if match := re.fullmatch(r"-*([A-Za-z_][\w.]*):\s*(.*)", word):
        key, value = match.groups()
        return key, f"{show(word)} is not an override; write {key}={value or 'VALUE'}, with = in place of :"
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", word):
        return word, f"{show(word)} is not an override; allowed: section.key=value, such as {word}=VALUE"
    return word or "override", f"{show(word)} is not an override; allowed: section.key=value"


def load_settings(path_or_shipped_name: str | Path) -> tuple[dict[str, Any], str]:
    """Return the mapping in a recipe, unchecked, and the file's name for errors.

    Raises:
        RecipeError: The file cannot be read, or is not a mapping.
    """
    path = _find(path_or_shipped_name)
    return read_settings(path), str(path)
