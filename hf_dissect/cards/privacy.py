"""Decides what a card may publish: ids of the Hub and plain settings, but no place on a disk and no token."""

import re
from collections.abc import Mapping
from pathlib import Path

from hf_dissect.hub.address import is_repo_id
from hf_dissect.hub.shared_recipe import is_local_path

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_HUB_FILES = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_AROUND_WORDS = "\"'`()[]{}<>,;:="


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be an id of the Hub, else None: the path of a local folder is of no use to a reader."""
    if not name or _TOKEN.search(name) or Path(name).exists() or not is_repo_id(name):
        return None
    return name


def hub_dataset(source: str | None, path: str | None) -> str | None:
    """Return the id on the Hub of the data at `source` and `path` of a recipe, or None if they are not on the Hub."""
    if source == "hub":
        return hub_id(path)
    shards = _HUB_FILES.match(path or "")
    return shards[1] if shards else None


def may_be_published(value: object) -> bool:
    """Check that no text in `value` is a local path, a URL or an access token."""
    if isinstance(value, Mapping):
        return all(may_be_published(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set):
        return all(map(may_be_published, value))
    if not isinstance(value, str):
        return True
    return not (_TOKEN.search(value) or any(_is_place(word.strip(_AROUND_WORDS)) for word in value.split()))


def _is_place(word: str) -> bool:
    if is_local_path(word) or "://" in word:
        return True
    separated = "/" in word or "\\" in word
    return separated and len(word) < 256 and Path(word).exists()


def leave_out_places(text: str) -> str:
    """Return `text` with each word that is a local path, a URL or an access token replaced by "[left out]"."""
    if may_be_published(text):
        return text
    return "".join(part if may_be_published(part) else "[left out]" for part in re.split(r"(\s+)", text))
