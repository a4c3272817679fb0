"""Which files of a run are published, and in what form: a list of what may go out, with nothing private in it."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_dissect.hub.repository import HubError
from hf_dissect.hub.shared_recipe import is_local_path, published_recipe
from hf_dissect.model_card import name_model
from hf_dissect.recipe.file import read_settings

RECIPE_FILE, METRICS_FILE, CARD_FILE = "recipe.yaml", "metrics.json", "README.md"
CARDS = (CARD_FILE, "report.png", "report.svg")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_CONFIGURATIONS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
ENCODER_FOLDER = "encoder"
"""Where, beside a student, its encoder lies alone."""
_PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", *_PIECES, "chat_template.jinja")
_BASE = tuple(f"base_model/{name}" for name in (*WEIGHTS[:2], "config.json", "generation_config.json"))
LOADED = (*WEIGHTS, *_CONFIGURATIONS, *_TOKENIZER, *_BASE, "tasks.json")
"""Patterns of the files that a model is loaded from."""
# Of a student, for those who do not have this package.
_ENCODER = tuple(f"{ENCODER_FOLDER}/{name}" for name in (*WEIGHTS[:2], *_CONFIGURATIONS, *_TOKENIZER))
PUBLISHED = (*LOADED, *_ENCODER, RECIPE_FILE, METRICS_FILE, *CARDS)
"""Patterns of all files that are published: no checkpoint, ledger, log, report with pictures, nor anything pickled."""

_LARGEST_TEXT = 50_000_000
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


def published_files(
    folder: Path, repo_id: str, cards_in: Path | None = None
) -> tuple[dict[str, Path | bytes], list[str]]:
    """What of a run's folder, or of a checkpoint, is published.

    Args:
        folder: where the files are.
        repo_id: the repository that they go to; card and recipe name it.
        cards_in: where the card and its picture are; `folder` by default.

    Returns:
        Path in the repository -> the file, or its content where that differs from the file's; and what stays behind,
        as it is of one machine only: dotted keys of the recipe, and the name of an adapter's base.

    Raises:
        HubError: a file still names a place of this machine, or holds a token.
    """
    paths = [path for place in ("", "base_model", ENCODER_FOLDER) for path in (folder / place).glob("*")]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}
    found: dict[str, Path | bytes] = {name: path for name, path in names.items() if is_published(name)}
    left_out: list[str] = []
    if cards_in is not None:
        found = {name: path for name, path in found.items() if name not in CARDS}
        found |= {name: cards_in / name for name in CARDS if (cards_in / name).is_file()}
    if CARD_FILE in found:
        found[CARD_FILE] = name_model(found[CARD_FILE].read_text(encoding="utf-8"), repo_id).encode()
    if RECIPE_FILE in found:
        text, left_out = published_recipe(read_settings(found[RECIPE_FILE]), repo_id)
        found[RECIPE_FILE] = text.encode()
    for name in found:
        if name == METRICS_FILE or Path(name).name in _CONFIGURATIONS:
            found[name] = without_paths(found[name])
    if found.get("adapter_config.json") != names.get("adapter_config.json"):
        left_out.append("base_model_name_or_path of the adapter")
    check_private(found, folder)
    return found, left_out


def is_published(path: str) -> bool:
    """Whether a file of a run is published; of a repository, whether a run may have put it there."""
    # Not `fnmatch` over the whole path: its * goes through folders.
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in PUBLISHED)


def without_paths(file: Path) -> Path | bytes:
    """A JSON file as it is where it names no place of a machine; else its content with null in their stead."""
    content = json.loads(file.read_text(encoding="utf-8"))
    cleaned = _cleaned(content)
    return file if cleaned == content else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def check_private(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Look through the text that is to be published for places of this machine and for tokens.

    Args:
        files: path in the repository -> file or content.
        folder: of the run.

    Raises:
        HubError: something was found; the message names the file and what it is.
    """
    searched = _private_texts(folder)
    for name, source in files.items():
        if _is_binary(name, source):
            continue
        content = source if isinstance(source, bytes) else source.read_bytes()
        for what, pattern in searched.items():
            if pattern.search(content):
                raise HubError(f"{name} would publish {what}; take it out there, and push again. Nothing was sent.")


def _is_binary(name: str, source: Path | bytes) -> bool:
    # A vocabulary is made of pieces of any text.
    vocabulary = Path(name).name in _TOKENIZER[:-1]
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    return vocabulary or name.endswith((".safetensors", ".png", ".parquet")) or size > _LARGEST_TEXT


def _private_texts(folder: Path) -> dict[str, re.Pattern[bytes]]:
    places = {
        "the path of the run's folder": folder.absolute(),
        "the path of your home folder": Path.home(),
        "the path of the working folder": Path.cwd(),
    }
    # A path such as / or /data is no secret, and in every second address.
    texts = {
        what: str(place) for what, place in places.items() if len(place.parts) > 2 or what.endswith("home folder")
    }
    texts = {what: text for what, text in texts.items() if len(text) > 1}
    patterns = {what: re.compile(re.escape(text.encode()) + rb"(?![\w-])") for what, text in texts.items()}
    if token := get_token():
        patterns["your token"] = re.compile(re.escape(token.encode()))
    return patterns | {"a token of the Hub": _TOKEN}


def _cleaned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    if not isinstance(value, str):
        return value
    # A relative folder else reads as a name of the Hub.
    is_folder = key.endswith("name_or_path") and value and Path(value).exists()
    return None if is_folder or (is_local_path(value) and len(Path(value).parts) > 1) else value
