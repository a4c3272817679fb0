"""Look through the samples of shards before they are rows: which columns they have, and whether they are whole."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_dissect.data.shards.archive import BadShard, Member
from hf_dissect.data.shards.columns import (
    CLASS_MEMBER,
    IMAGE_MEMBERS,
    JSON_CAPTIONS,
    TEXT_MEMBERS,
    describe_kind,
    find_captions,
    find_field,
    find_image,
    parse_json,
)
from hf_dissect.data.shards.samples import Sample, group_samples

MOST_SAMPLES = 1000
"""Number of samples of a stream after which the search for a pair and the needed fields ends."""
_STEPS = (32, 256, 1024, 4096)
"""Numbers of members of a shard after which it is checked whether enough is known."""


@dataclass(frozen=True)
class Asked:
    """Settings that name members or JSON fields.

    Args:
        image: Name of the picture; None recognises it.
        caption: Name of the captions; None recognises them.
        fields: Names of further values.
        truths: Those of them that say whether the caption belongs to the picture, which a sample without one lacks.
    """

    image: str | None = None
    caption: str | None = None
    fields: tuple[str, ...] = ()
    truths: tuple[str, ...] = ()

    @property
    def image_name(self) -> str | None:
        """Member or field of the picture; None for the recognised one."""
        return None if self.image in (None, "image") else self.image

    def is_wanted(self, name: str) -> bool:
        """Return whether a survey needs the content of a member. That a picture is there and not empty is enough."""
        file = name.rpartition("/")[2].lower()
        ends = {file.partition(".")[2], file.rpartition(".")[2]}
        others = {str(name).lower() for name in (self.caption, *self.fields) if name}
        return not ends.isdisjoint({*TEXT_MEMBERS, CLASS_MEMBER, "json", *others}) and ends.isdisjoint(IMAGE_MEMBERS)


@dataclass
class Survey:
    """Facts about samples, in types that JSON has.

    Attributes:
        samples: Number of samples.
        pairs: Number of those with a picture and a caption.
        images: Number of those with a picture.
        captions: Number of those with a caption.
        lists: Number of those whose captions are a list.
        hidden_lists: Number of those with a text member, which hides several captions in the JSON.
        links: Number of links, which are not read.
        members: Number of samples by extension.
        kinds: Kinds of values by field, see `describe_kind`.
        without: Field to the first sample that has no value of it, as shard and key.
        first: Shard and key of the first sample, of the first with a picture, and of the first with a caption.
    """

    samples: int = 0
    pairs: int = 0
    images: int = 0
    captions: int = 0
    lists: int = 0
    hidden_lists: int = 0
    links: int = 0
    members: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, shard: str, sample: Sample, asked: Asked) -> None:
        """Add a sample."""
        key, members = sample
        record = parse_json(members)
        has_image = find_image(members, asked.image_name and asked.image_name.lower()) is not None
        if asked.image_name is not None and not has_image:
            has_image = isinstance(record.get(asked.image_name), str)
        captions, is_list = find_captions(members, record, asked.caption)
        listed = (record.get(name) for name in JSON_CAPTIONS)
        self.samples += 1
        self.pairs += has_image and bool(captions)
        self.images += has_image
        self.captions += bool(captions)
        self.lists += is_list
        self.hidden_lists += bool(captions) and not is_list and any(isinstance(v, list) and len(v) > 1 for v in listed)
        for extension in members:
            self.members[extension] = self.members.get(extension, 0) + 1
        places = {"sample": True, "picture": has_image, "caption": bool(captions)}
        for name in (name for name, found in places.items() if found):
            self.first.setdefault(name, [shard, key])
        values = dict(record)
        for name in {CLASS_MEMBER, *asked.fields} - values.keys():
            if (value := find_field(members, record, name)) is not None:
                values[name] = value
        for name, value in values.items():
            kinds = self.kinds.setdefault(name, [])
            if (kind := describe_kind(value)) not in kinds:
                kinds.append(kind)
        for name in asked.fields:
            if values.get(name) is None and (captions or name not in asked.truths):
                self.without.setdefault(name, [shard, key])

    def merge(self, other: "Survey") -> None:
        """Add the samples of another survey, which come later."""
        for name in ("samples", "pairs", "images", "captions", "lists", "hidden_lists", "links"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for extension, count in other.members.items():
            self.members[extension] = self.members.get(extension, 0) + count
        for name, kinds in other.kinds.items():
            self.kinds[name] = list(dict.fromkeys(self.kinds.get(name, []) + kinds))
        self.without = other.without | self.without
        self.first = other.first | self.first


@dataclass
class NamedSurveys:
    """Surveys of the same members, named up to the first dot and, if any name has several, up to the last dot."""

    first_dot: Survey = field(default_factory=Survey)
    last_dot: Survey = field(default_factory=Survey)

    @property
    def better(self) -> tuple[Survey, bool]:
        """Survey with more pairs, and whether it is that up to the last dot; WebDataset's rule is the first dot."""
        is_last = self.last_dot.pairs > self.first_dot.pairs
        return (self.last_dot if is_last else self.first_dot), is_last

    def merge(self, other: "NamedSurveys") -> None:
        """Add other members, which come later."""
        self.first_dot.merge(other.first_dot)
        self.last_dot.merge(other.last_dot)

    def to_json(self) -> dict[str, Any]:
        """Return the facts in types that JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "NamedSurveys":
        """Make surveys from what `to_json` returned."""
        return cls(Survey(**saved["first_dot"]), Survey(**saved["last_dot"]))


def survey_shard(shard: str, members: Iterator[Member], asked: Asked) -> tuple[NamedSurveys, str | None]:
    """Survey a whole shard.

    Args:
        shard: Name of the shard, for messages.
        members: Members in order.
        asked: Settings that name members or fields.

    Returns:
        Surveys of the samples before the damage, and the reason of the damage, if any.
    """
    kept, problem, at_end = _read_some(members, [], sys.maxsize)
    return survey_members(shard, kept, asked, at_end, problem)


def survey_members(
    shard: str, members: list[Member], asked: Asked, at_end: bool, problem: str | None
) -> tuple[NamedSurveys, str | None]:
    """Survey members of a shard, see `survey_shard`.

    Args:
        shard: Name of the shard, for messages.
        members: First members.
        asked: Settings that name members or fields.
        at_end: Whether the last sample has all of its members; otherwise it is left out.
        problem: Reason of the damage after these members, if any.
    """
    surveys = NamedSurveys()
    surveys.first_dot, first_problem = _survey_samples(shard, members, asked, at_end, False, problem)
    surveys.last_dot, last_problem = surveys.first_dot, first_problem
    if any(member.name.rpartition("/")[2].count(".") > 1 for member in members):
        surveys.last_dot, last_problem = _survey_samples(shard, members, asked, at_end, True, problem)
    return surveys, last_problem if surveys.better[1] else first_problem


def look_ahead(
    shards: Sequence[str], read: Callable[[str], Iterator[Member]], asked: Asked, needed: Sequence[str]
) -> tuple[NamedSurveys, dict[str, str]]:
    """Survey the beginning of a stream, as far as it takes to find a pair and the needed fields.

    Args:
        shards: Names of the shards in order.
        read: Function from the name of a shard to its members.
        asked: Settings that name members or fields.
        needed: Those of the fields that must be found.

    Returns:
        Surveys of the first samples, and the damaged shards among those that were read, with the reason.
    """
    total, damaged = NamedSurveys(), {}
    for shard in shards:
        members: list[Member] = []
        surveys = NamedSurveys()
        reader = read(shard)
        for step in _STEPS:
            members, problem, at_end = _read_some(reader, members, step)
            surveys, problem = survey_members(shard, members, asked, at_end, problem)
            if problem is not None:
                damaged[shard] = problem
            so_far = NamedSurveys()
            so_far.merge(total)
            so_far.merge(surveys)
            survey, _ = so_far.better
            if survey.pairs and all(set(survey.kinds.get(name, ())) - {"null"} for name in needed):
                return so_far, damaged
            if at_end or problem is not None:
                break
        total.merge(surveys)
        if total.first_dot.samples >= MOST_SAMPLES:
            break
    return total, damaged


def _read_some(reader: Iterator[Member], members: list[Member], count: int) -> tuple[list[Member], str | None, bool]:
    """Return members and further ones up to a number, the reason if there is damage, and whether these are all."""
    members = list(members)
    try:
        for member in reader:
            members.append(member)
            if len(members) >= count:
                return members, None, False
    except BadShard as error:
        return members, str(error), False
    return members, None, True


def _survey_samples(
    shard: str, members: list[Member], asked: Asked, at_end: bool, at_last_dot: bool, problem: str | None
) -> tuple[Survey, str | None]:
    survey = Survey(links=sum(member.is_link for member in members))
    samples: list[Sample] = []
    try:
        for sample in group_samples(_read_again(members, problem), at_last_dot):
            samples.append(sample)
        if not at_end:
            samples = samples[:-1]
    except BadShard as error:
        problem = str(error)
    for sample in samples:
        survey.add(shard, sample, asked)
    return survey, problem


def _read_again(members: list[Member], problem: str | None) -> Iterator[Member]:
    yield from members
    if problem is not None:
        raise BadShard(problem)
