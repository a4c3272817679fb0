"""Settings, declared once with default, help, choices and range, and read by recipes and trainer arguments."""

import copy
import dataclasses
import difflib
import enum
import functools
import inspect
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Declaration of a dataclass field, apart from its type and default.

    Attributes:
        help: Effect of the setting, in full sentences.
        choices: Allowed values, of each element for a list; empty for any.
        within: Allowed interval such as "(0, 1]", of each element for a list; empty for any.
        argument: Trainer argument that takes the value, for a setting of a recipe.
    """

    help: str
    choices: tuple = ()
    within: str = ""
    argument: str | None = None


class _Help(str):
    """Help text of a field, with the declaration attached.

    `HfArgumentParser` passes every entry of a field's metadata to `argparse`, so a range cannot have its own entry.
    """

    setting: Setting


def setting(
    default: Any, help: str, *, choices: tuple = (), within: str = "", argument: str | None = None
) -> Any:  # as `dataclasses.field`, since the annotation of the field gives its type
    """Declare a field of a dataclass of settings.

    Args:
        default: Value of an absent setting; lists and dicts are copied.
        help: Effect of the setting, in full sentences.
        choices: Allowed values, of each element for a list; empty for any.
        within: Allowed interval such as "(0, 1]", of each element for a list; empty for any.
        argument: Trainer argument that takes the value, for a setting of a recipe.

    Returns:
        The field, to be assigned in the body of a dataclass.
    """
    text = _Help(f"{help} Allowed: {_describe_interval(within)}." if within else help)
    text.setting = Setting(help, choices, within, argument)
    metadata = {"help": text} | ({"choices": choices} if choices else {})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declared(section: type, name: str) -> Any:
    """Return a field with the default, help, choices and range of the setting `name` of `section`."""
    (source,) = (field for field in dataclasses.fields(section) if field.name == name)
    return dataclasses.field(default=source.default, default_factory=source.default_factory, metadata=source.metadata)


def find_setting(field: dataclasses.Field) -> Setting | None:
    """Return the declaration of a field, None for a field without one."""
    return getattr(field.metadata.get("help"), "setting", None)


@functools.cache
def list_settings(section: type) -> dict[str, tuple[Any, Setting]]:
    """Return the type and the declaration of each declared field of a dataclass, by name."""
    hints = typing.get_type_hints(section)
    found = ((field.name, find_setting(field)) for field in dataclasses.fields(section))
    return {name: (hints[name], declaration) for name, declaration in found if declaration is not None}


def find_problems(section: type, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each value that the declarations in `section` do not allow."""
    for name, (expected, declaration) in list_settings(section).items():
        if name not in values:
            continue
        if problem := describe_problem(values[name], expected, declaration.choices, declaration.within):
            yield name, problem


def check_values(section: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check values against their declarations in `section`.

    Args:
        section: Dataclass with the declarations.
        values: Values by name; names without a declaration are not checked.
        prefix: Text before the name in the message.

    Raises:
        ValueError: A value is not allowed; the message names it, its value and the allowed ones.
    """
    for name, problem in find_problems(section, values):
        raise ValueError(f"{prefix}{name}={problem}.")


def list_in_docstring(arguments: _Class) -> _Class:
    """Append every field that a dataclass declares, with help and default, to the docstring of the class."""
    about, raises, errors = inspect.cleandoc(arguments.__doc__ or "").partition("Raises:")
    lines = [about.rstrip(), "", "Args:"]
    fields = {field.name: field for field in dataclasses.fields(arguments)}
    for name, (_, declaration) in list_settings(arguments).items():
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = f"{name}: {field.metadata['help']} Default: {default!r}."
        if declaration.choices:
            text = text.replace(" Default:", f" Allowed: {', '.join(map(str, declaration.choices))}. Default:")
        lines += textwrap.wrap(text, 119, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    arguments.__doc__ = "\n".join([*lines, "", raises + errors]).rstrip() + "\n"
    return arguments


def show(value: Any) -> str:
    """Return `value` as text for an error message, cut if it is long."""
    return _SHORT.repr(value)


def find_nearest(given: Any, known: Iterable[Any]) -> str | None:
    """Return the known word that is most similar to the given one; None if no word is similar."""
    return next(iter(difflib.get_close_matches(str(given), list(map(str, known)), n=1)), None)


def suggest(given: Any, known: Iterable[Any]) -> str:
    """Return "; did you mean ...?" for an error message, or nothing where none of the `known` words is close."""
    near = find_nearest(given, known)
    return f"; did you mean {near!r}?" if near else ""


def describe_problem(value: Any, expected: Any, choices: Sequence = (), within: str = "") -> str | None:
    """Return what is wrong with a value, in words that begin with the value; None when nothing is.

    Args:
        value: Plain data.
        expected: Declared type, the same as in an annotation.
        choices: Allowed values, of each element for a list.
        within: Allowed interval such as "(0, 1]", of each element for a list.
    """
    if not _matches(value, expected):
        allowed = ", ".join(map(str, choices)) + _or_null(expected) if choices else _describe(expected)
        if within:
            allowed += f", {_describe_interval(within).removeprefix('a number ')}"
        return f"{show(value)} is not allowed; allowed: {allowed}{_suggest_without_quotes(value, expected)}"
    for item in value if isinstance(value, list) else [value]:
        if choices and item is not None and item not in choices:
            allowed = ", ".join(map(str, choices)) + _or_null(expected)
            return f"{show(item)} is not allowed; allowed: {allowed}{suggest(item, choices)}"
        if within and _is_number(item) and not _inside(item, within):
            return f"{show(item)} is not allowed; allowed: {_describe_interval(within)}{_or_null(expected)}"
    return None


def _suggest_without_quotes(value: Any, expected: Any) -> str:
    """Return what to add for text in place of a number."""
    if not isinstance(value, str) or not {int, float} & set(list_members(expected)):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return f"; write {value.strip()} without quotes"


def list_members(expected: Any) -> tuple:
    """Return the alternatives of a union. Text next to an enumeration stands for one of its values, so is not one."""
    if typing.get_origin(expected) not in (typing.Union, types.UnionType):
        return (expected,)
    members = typing.get_args(expected)
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        members = tuple(member for member in members if member is not str)
    return members


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _or_null(expected: Any) -> str:
    return " or null" if type(None) in list_members(expected) else ""


def _matches(value: Any, expected: Any) -> bool:
    members = list_members(expected)
    if len(members) > 1:
        return any(_matches(value, member) for member in members)
    expected = members[0]
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is None or expected is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if expected is list or origin is list:
        return isinstance(value, list) and all(_matches(item, argument) for argument in arguments for item in value)
    if {expected, origin} & {tuple, set}:
        return isinstance(value, list)  # as YAML writes them
    if expected in (float, int):
        # Integers from 2 ** 63 on overflow in the libraries that take them, and in float().
        sized = _is_number(value) and (isinstance(value, float) or abs(value) < 2**63)
        return sized and (expected is float or isinstance(value, int))
    if expected in (str, bool):
        return isinstance(value, expected)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return isinstance(value, str) and value in [member.value for member in expected]
    # Everything else (dict, Any, ParallelismConfig, ...) is written as a mapping, or is not ours to judge.
    return expected is Any or isinstance(value, dict)


def _describe(expected: Any) -> str:
    members = list_members(expected)
    if len(members) > 1:
        return " or ".join(_describe(member) for member in members)
    expected = members[0]
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return ", ".join(str(member.value) for member in expected)
    if typing.get_origin(expected) is list:
        return f"a list ({_describe(typing.get_args(expected)[0])})"
    if typing.get_origin(expected) is typing.Literal:
        return " or ".join(str(argument).lower() for argument in typing.get_args(expected))
    return _WORDS.get(type(None) if expected is None else expected, "a mapping")


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _describe_interval(interval: str) -> str:
    low, high = (part.strip() for part in interval[1:-1].split(","))
    if high == "inf":
        return f"at least {low}" if interval[0] == "[" else f"more than {low}"
    return f"a number in {interval}"
