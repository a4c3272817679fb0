"""Files of a run that are published, chosen by a list of what may go out and checked for anything private."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_dissect.hub.repository import HubError
from hf_dissect.hub.shared_recipe import format_published_recipe, is_local_path
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
"""Folder next to a student that holds its encoder alone."""
_PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", *_PIECES, "chat_template.jinja")
_BASE = tuple(f"base_model/{name}" for name in (*WEIGHTS[:2], "config.json", "generation_config.json"))
_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
LOADED = (*WEIGHTS, *_CONFIGURATIONS, *_TOKENIZER, *_BASE, *_SENTENCE_FILES, "tasks.json")
"""Patterns of the files to load a model from."""
# The encoder of a student, for those who do not have this package.
_ENCODER = tuple(f"{ENCODER_FOLDER}/{name}" for name in (*WEIGHTS[:2], *_CONFIGURATIONS, *_TOKENIZER))
PUBLISHED = (*LOADED, *_ENCODER, RECIPE_FILE, METRICS_FILE, *CARDS)
"""Patterns of all files that are published: no checkpoint, ledger, log, report with pictures, nor anything pickled."""

_LARGEST_TEXT = 50_000_000
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_MODEL_ID = re.compile(r"(^```python\n.*?^model_id = )[^\n]*", re.MULTILINE | re.DOTALL)


def select_published_files(
    folder: Path, repo_id: str, cards_in: Path | None = None
) -> tuple[dict[str, Path | bytes], list[str]]:
    """Select the files of a run folder or of a checkpoint that are published, and remove what is private.

    Args:
        folder: Folder of the files.
        repo_id: Repository to publish in; card and recipe name it.
        cards_in: Folder of the card and its picture; `folder` by default.

    Returns:
        Path in the repository -> file, or content where that differs from the file's; and what is left out because it
        belongs to one machine: dotted keys of the recipe, and the name of an adapter's base.

    Raises:
        HubError: A file still names a place of this machine, or holds a token.
    """
    paths = [path for place in ("", "base_model", ENCODER_FOLDER) for path in (folder / place).glob("*")]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}
    sources = {name: path for name, path in names.items() if is_published(name)}
    left_out: list[str] = []
    if cards_in is not None:
        sources = {name: path for name, path in sources.items() if name not in CARDS}
        sources |= {name: cards_in / name for name in CARDS if (cards_in / name).is_file()}
    files: dict[str, Path | bytes] = dict(sources)
    if CARD_FILE in sources:
        files[CARD_FILE] = name_model(sources[CARD_FILE].read_text(encoding="utf-8"), repo_id).encode()
    if RECIPE_FILE in sources:
        text, left_out = format_published_recipe(read_settings(sources[RECIPE_FILE]), repo_id)
        files[RECIPE_FILE] = text.encode()
    for name, path in sources.items():
        if name == METRICS_FILE or path.name in _CONFIGURATIONS:
            files[name] = remove_paths(path)
    if files.get("adapter_config.json") != names.get("adapter_config.json"):
        left_out.append("base_model_name_or_path of the adapter")
    check_private(files, folder)
    return files, left_out


def name_model(card: str, model_id: str) -> str:
    """Name `model_id`, an id of the Hub, in the loading snippet of a card and return the text of the card."""
    return _MODEL_ID.sub(lambda match: match[1] + json.dumps(model_id), card, count=1)


def is_published(path: str) -> bool:
    """Return True for a file of a run that is published, or one of a repository that a run may have put there."""
    # Not `fnmatch` over the whole path: its * goes through folders.
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in PUBLISHED)


def remove_paths(file: Path) -> Path | bytes:
    """Return a JSON file that names no path of a machine unchanged, any other as content with null for each path."""
    content = json.loads(file.read_text(encoding="utf-8"))
    cleaned = _cleaned(content)
    return file if cleaned == content else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def check_private(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Check that text to be published holds neither paths of this machine nor tokens.

    Args:
        files: Path in the repository -> file or content.
        folder: Run folder.

    Raises:
        HubError: A file holds one; the message names the file and what it holds.
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
    # A path such as / or /data is not a secret, and part of every second address.
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
    # A relative folder would otherwise read as a name of the Hub.
    is_folder = key.endswith("name_or_path") and value and Path(value).exists()
    return None if is_folder or (is_local_path(value) and len(Path(value).parts) > 1) else value
