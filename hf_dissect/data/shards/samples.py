"""Group the members of a shard into samples, by their names."""

import itertools
from collections.abc import Iterable, Iterator

from hf_dissect.data.shards.archive import BadShard, Member

Sample = tuple[str, dict[str, bytes]]
"""Key, and content of the members by extension in lower case."""

_LEFT_BY_MACOS = "__MACOSX"


def split_name(name: str, at_last_dot: bool = False) -> tuple[str, str] | None:
    """Return key and extension of a member; None for a name without an extension, and for hidden files.

    Args:
        name: Name with its folders, which are part of the key.
        at_last_dot: Whether the extension begins after the last dot instead of the first one.
    """
    folder, _, file = name.rpartition("/")
    parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
    if file.startswith(".") or any(part.startswith(".") or part == _LEFT_BY_MACOS for part in parts):
        return None
    stem, dot, extension = file.rpartition(".") if at_last_dot else file.partition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):  # notes on the shard, in WebDataset
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def group_samples(members: Iterable[Member], at_last_dot: bool = False) -> Iterator[Sample]:
    """Yield the samples of a shard: members with the same key that are next to each other.

    Where all members of a key repeat in the same order (`x.jpg x.txt x.jpg x.txt`), each round is a sample. The last
    sample before a damaged place is left out, unless it has the same members as the one before.

    Args:
        members: Members in order, whose reader may raise a `BadShard`.
        at_last_dot: See `split_name`.

    Raises:
        BadShard: If the shard is damaged, or a member repeats in any other way, so that nobody can tell what belongs
            together. What came before has been yielded.
    """
    damage: list[BadShard] = []
    shape: set[str] | None = None
    waiting: Sample | None = None
    repetition: BadShard | None = None
    try:
        for sample in _group_by_key(_stop_at_damage(members, damage), at_last_dot):
            if waiting is not None:
                yield waiting
                shape = set(waiting[1])
            waiting = sample
    except BadShard as error:
        repetition = error
    if waiting is not None and (not damage or repetition or set(waiting[1]) == shape):
        yield waiting
    if damage or repetition:
        raise damage[0] if damage else repetition  # type: ignore[misc]  # one of both is there


def _stop_at_damage(members: Iterable[Member], damage: list[BadShard]) -> Iterator[Member]:
    try:
        yield from members
    except BadShard as error:
        damage.append(error)


def _group_by_key(members: Iterable[Member], at_last_dot: bool) -> Iterator[Sample]:
    named = ((split_name(member.name, at_last_dot), member) for member in members if not member.is_link)
    files = ((name, member) for name, member in named if name is not None)
    for (_, key), run in itertools.groupby(files, key=lambda item: (item[1].archive, item[0][0])):
        yield from _split_rounds(key, ((name[1], member.content) for name, member in run))


def _split_rounds(key: str, files: Iterable[tuple[str, bytes]]) -> Iterator[Sample]:
    sample: dict[str, bytes] = {}
    first_round: list[str] | None = None
    for extension, content in files:
        if extension in sample and extension == next(iter(sample)):
            _check_round(key, sample, first_round, extension)
            yield key, sample
            first_round, sample = first_round or list(sample), {}
        elif extension in sample or (first_round and first_round[len(sample) : len(sample) + 1] != [extension]):
            raise _describe_repetition(key, extension)
        sample[extension] = content
    if first_round:
        _check_round(key, sample, first_round, next(iter(sample)))
    yield key, sample


def _check_round(key: str, sample: dict[str, bytes], first_round: list[str] | None, extension: str) -> None:
    if first_round is not None and list(sample) != first_round:
        raise _describe_repetition(key, extension)


def _describe_repetition(key: str, extension: str) -> BadShard:
    return BadShard(
        f"the key {key!r} has more than one member {extension!r}, and their order does not show which members belong "
        "together; give each sample a key of its own"
    )
