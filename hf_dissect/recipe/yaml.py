"""The YAML that recipes are written in: plain data only, with the surprises of YAML 1.1 removed."""

import re
from typing import Any

import yaml

# YAML 1.1 reads `no` as false, `1:30` as 90, `010` as 8, `2024-01-01` as a date and `1e-3` as text.
# Recipes follow YAML 1.2 instead: what looks like a number is one, and everything else is text.
_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_FLOAT = "tag:yaml.org,2002:float"


class _RecipeLoader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys, anchors, and any value that is not plain data."""

    yaml_implicit_resolvers = {}
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag in {*_SCALARS, "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None}
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        # An alias could make a recipe refer to itself, or grow without bound when it is written out.
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, f"anchors and aliases are not supported ({event.anchor!r})", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # `!!int abc`, or an integer of thousands of digits
            problem = f"cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _RecipeDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _SCALARS.items():
    # The empty scalar has no first letter; PyYAML files it under "".
    _letters = [letter if letter != "\0" else "" for letter in _first]
    _RecipeLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _letters)
_RecipeDumper.add_implicit_resolver(_FLOAT, re.compile(f"^(?:{_SCALARS[_FLOAT][0]})$"), list(_SCALARS[_FLOAT][1]))


def parse_yaml(text: str) -> Any:
    """Return the plain data written in `text`: mappings, lists, text, integers, floats, booleans and nulls.

    Raises:
        ValueError: The YAML is broken, or has a repeated key, an anchor, an alias or a tagged object; the message
            names line and column.
    """
    try:
        # The loader derives from SafeLoader and only removes constructors: this is `yaml.safe_load`, stricter.
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character {chr(error.character)!r} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in problem:
            problem += "; YAML is indented by spaces, never by tabs"
        elif "expected a single document" in problem:
            problem += "; a file holds one recipe, without a line ---"
        raise ValueError(f"{place}{problem}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def format_yaml(data: Any) -> str:
    """Return `data` as YAML that `parse_yaml` reads back to an equal value, mappings in their own order."""
    return yaml.dump(data, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
