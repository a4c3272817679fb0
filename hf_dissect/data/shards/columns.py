"""Make a row of a sample: its picture, its captions and the plain values of its JSON member."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from datasets import Features, Image, List, Value

from hf_dissect.data.surrogates import can_be_encoded, escape_unencodable, is_unencodable

KEY_COLUMN = "__key__"
JSON_COLUMN = "__json__"
CLASS_MEMBER = "cls"
LABEL_FIELDS = (CLASS_MEMBER, "label", "labels", "class", "category", "target")
"""Usual names of a label, which a stream has as columns of their own, for classification."""

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pnm", "pbm")
TEXT_MEMBERS = ("txt", "caption", "text")
JSON_CAPTIONS = ("captions", "text", "caption")
"""Names of the captions in a JSON member; the first one that is not empty is taken."""

_INTEGER = re.compile(r"[+-]?\d+")
_EXACT_IN_FLOAT = 2**53
_TYPES = {("bool",): "bool", ("int",): "int64", ("int", "wide int"): "int64", ("wide int",): "int64"}
_TYPES |= {("float",): "float64", ("float", "int"): "float64"}


@dataclass(frozen=True)
class Layout:
    """The columns of the rows.

    Args:
        image: Column of the picture.
        image_member: Extension of the member with the picture; None for the first of `IMAGE_MEMBERS`. Empty if there
            is none.
        caption: Column of the caption; None if there is none.
        asked_caption: Member or JSON field with the caption; None for the first that is not empty.
        several: Whether the captions are a list.
        fields: Names and types of further columns: values of the JSON member or the text of a member.
        required: Fields of which every sample with a caption needs a value.
        truths: Fields with the truth, false where there is no caption that could belong to the picture.
        has_json: Whether there is a column with the JSON member as text.
        at_last_dot: See `split_name`.
    """

    image: str
    image_member: str | None
    caption: str | None
    asked_caption: str | None
    several: bool
    fields: tuple[tuple[str, str], ...]
    required: tuple[str, ...] = ()
    truths: tuple[str, ...] = ()
    has_json: bool = False
    at_last_dot: bool = False

    @property
    def features(self) -> Features:
        """Columns and their types."""
        text = Value("string")
        features: dict[str, Any] = {}
        if self.image_member != "":
            features[self.image] = Image(decode=False)
        if self.caption is not None:
            features[self.caption] = List(text) if self.several else text
        features[KEY_COLUMN] = text
        features |= {name: Value(kind) for name, kind in self.fields}
        return Features(features | ({JSON_COLUMN: text} if self.has_json else {}))

    def is_wanted(self, name: str) -> bool:
        """Return whether the content of a member is needed, by its name."""
        file = name.rpartition("/")[2].lower()
        ends = {file.partition(".")[2], file.rpartition(".")[2]}
        pictures = IMAGE_MEMBERS if self.image_member is None else (self.image_member,)
        names = {field for field, _ in self.fields}
        return not ends.isdisjoint({*pictures, *TEXT_MEMBERS, "json", self.asked_caption} | names)


def make_row(shard: str, key: str, members: Mapping[str, bytes], layout: Layout) -> dict[str, Any]:
    """Return the row of a sample.

    Raises:
        ValueError: If a field does not have the type of its column, or a required one is missing; if a sample has
            several captions where one is expected. The message names shard and key.
    """
    record = parse_json(members)
    captions, _ = find_captions(members, record, layout.asked_caption)
    row: dict[str, Any] = {}
    if layout.image_member != "":
        picture = find_image(members, layout.image_member)
        row[layout.image] = None if picture is None else {"bytes": picture, "path": None}
    if layout.caption is not None:
        if len(captions) > 1 and not layout.several:
            raise ValueError(
                f"Sample {key!r} of {shard!r} has a list of {len(captions)} captions, but those at the beginning of "
                "the stream have one caption each. Set data.caption_column to captions for lists throughout, or to "
                f"the member or JSON field that holds one caption; it has {list_names(members, record)}."
            )
        row[layout.caption] = captions if layout.several else (captions[0] if captions else None)
    row[KEY_COLUMN] = key
    for name, kind in layout.fields:
        value = find_field(members, record, name)
        if value is None and name in layout.truths and not captions:
            value = 0 if kind == "int64" else False  # a pair that will be skipped
        if value is None and name in layout.required and captions:
            raise ValueError(
                f"Sample {key!r} of {shard!r} has no value {name!r}; it has {list_names(members, record)}. Add it, or "
                "name another column."
            )
        try:
            row[name] = _convert(value, kind)
        except TypeError:
            if name not in layout.required:  # the whole value is in the JSON as text
                row[name] = None
                continue
            raise ValueError(
                f"Field {name!r} of sample {key!r} of {shard!r} is {_shorten(value)}, but the samples at the "
                f"beginning of the stream have {kind}. Write values of one type, or name another column."
            ) from None
    if layout.has_json:
        row[JSON_COLUMN] = members["json"].decode("utf-8-sig", errors="replace") if "json" in members else None
    return row


class Halves:
    """Check that picture and caption of a sample do not lie in two places of a shard.

    Args:
        shard: Name of the shard, for the message.
        layout: Columns of its rows.
    """

    def __init__(self, shard: str, layout: Layout) -> None:
        self._shard = shard
        self._image, self._caption = layout.image, layout.caption
        self._has_both = layout.image_member != "" and layout.caption is not None
        self._has_picture: dict[str, bool] = {}

    def check(self, key: str, row: Mapping[str, Any]) -> None:
        """Check the next row of the shard.

        Raises:
            ValueError: If it has the picture of an earlier row without one, whose caption it lacks, or the opposite.
        """
        if not self._has_both:
            return
        has_picture = row[self._image] is not None
        if has_picture == bool(row[cast(str, self._caption)]):
            return
        if self._has_picture.setdefault(key, has_picture) != has_picture:
            raise ValueError(
                f"Sample {key!r} of {self._shard!r} lies in two places, the picture in one and the caption in "
                "another. The members of a sample are next to each other: write the shard again in the order of the "
                "names (tar --sort=name)."
            )


def find_image(members: Mapping[str, bytes], name: str | None) -> bytes | None:
    """Return the first picture of a sample that is not empty, or the one of the given member."""
    names = IMAGE_MEMBERS if name is None else (name,)
    present = [members[name] for name in names if name in members]
    return next(filter(None, present), present[0] if present else None)


def find_captions(
    members: Mapping[str, bytes], record: Mapping[str, Any], asked: str | None
) -> tuple[list[str | None], bool]:
    """Return the captions of a sample, and whether they are a list in its JSON.

    Args:
        members: Members of the sample.
        record: Its JSON member, parsed.
        asked: Member or JSON field with the captions. None takes the first one that is not empty, of text members and
            JSON fields; so do "caption" and "captions", where the sample has nothing of this name.
    """
    if asked is not None:
        found = _first_captions(members, record, (asked.lower(),), (asked,))
        if found[0] or asked not in ("caption", "captions"):
            return found
    return _first_captions(members, record, TEXT_MEMBERS, JSON_CAPTIONS)


def find_field(members: Mapping[str, bytes], record: Mapping[str, Any], name: str) -> Any:
    """Return a value of the JSON member, or else the text of the member of this name, as an integer if it is one."""
    if name in record:
        return record[name]
    content = members.get(name.lower())
    if content is None:
        return None
    text = _decode(content)
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 19 else text or None


def parse_json(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the JSON member of a sample, empty if there is none or it is broken."""
    try:
        record = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}  # a row without a caption, which is counted like any other bad row
    return record if isinstance(record, dict) else {}


def describe_kind(value: Any) -> str:
    """Return the kind of a value, see `choose_type`; "null" for a missing one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT_IN_FLOAT else "wide int" if -(2**63) <= value < 2**63 else "big int"
    return {float: "float", str: "str"}.get(type(value), "nested")


def choose_type(kinds: set[str]) -> str | None:
    """Return the narrowest type that holds all values unchanged; None for a field without plain values.

    Values that have nothing else in common become text, as in JSON.
    """
    present = kinds - {"null"}
    if not present or present == {"nested"}:
        return None
    return _TYPES.get(tuple(sorted(present)), "string")


def list_names(members: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the members and JSON fields of a sample, for messages."""
    names = ", ".join(sorted(members)[:20]) or "nothing"
    return f"the members {names}" + (f", and in the JSON {', '.join(sorted(record)[:20])}" if record else "")


def _first_captions(
    members: Mapping[str, bytes], record: Mapping[str, Any], names: tuple[str, ...], fields: tuple[str, ...]
) -> tuple[list[str | None], bool]:
    for name in names:
        if name in members and (text := _decode(members[name])):
            return [text], False
    unencodable: list[str | None] = []  # a caption for want of a better one, which is then counted for what it is
    for name in fields:
        value = record.get(name)
        if isinstance(value, list):
            texts = [escape_unencodable(text) for text in value if isinstance(text, str)]
            if any(text.strip() and not is_unencodable(text) for text in texts):
                return texts, True
            unencodable += [text for text in texts if is_unencodable(text)]
        elif isinstance(value, str) and value.strip():
            if can_be_encoded(value):
                return [value], False
            unencodable.append(escape_unencodable(value))
    return unencodable[:1], False


def _decode(content: bytes) -> str:
    # A hole of zeros in a damaged file is not a caption.
    return content.decode("utf-8-sig", errors="replace").strip().strip("\0").strip()


def _convert(value: Any, kind: str) -> Any:
    """Return the value in the type of its column.

    Raises:
        TypeError: If it does not have this type.
    """
    found = describe_kind(value)
    if found == "null":
        return None
    if kind == "string":
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode()
    if found not in {"bool": ("bool",), "int64": ("int", "wide int"), "float64": ("int", "float")}[kind]:
        raise TypeError
    return float(value) if kind == "float64" else value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
