"""Models that sentence-transformers saved: the folder of the dual encoder in them, and what must not be left out."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_dissect.models.pretrained_parts import find_file

MODULES_FILE = "modules.json"
_ENCODERS = ("CLIPModel", "Transformer", "SentenceEncoder")
# They change nothing about a dual encoder, whose embeddings are compared by their directions.
_WITHOUT_EFFECT = ("Normalize", "Dropout")


def find_encoder_folder(name_or_path: str) -> str:
    """Return the name or folder of the dual encoder in a model of sentence-transformers.

    Args:
        name_or_path: Hub id or local folder of any model.

    Returns:
        The folder, downloaded if it is a part of a repository; `name_or_path` itself for any other model.

    Raises:
        ValueError: Further modules with weights lie behind the encoder, or it consists of several.
        OSError: `modules.json` cannot be read, or the folder that it names is missing.
    """
    file = find_file(name_or_path, MODULES_FILE)
    if file is None:
        return name_or_path
    try:
        modules = [
            (module["type"].rpartition(".")[2], module["path"]) for module in json.loads(Path(file).read_text())
        ]
        (first, place), *others = modules
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(
            f"name_or_path {name_or_path!r}: {MODULES_FILE} cannot be read as that of sentence-transformers "
            f"({type(error).__name__}: {error}); copy or download it again"
        ) from error
    kinds = [kind for kind, _ in others]
    if first not in _ENCODERS:
        raise ValueError(
            f"name_or_path {name_or_path!r} is a model of sentence-transformers that begins with {first}; a dual "
            f"encoder begins with CLIPModel or Transformer. Name the model from which it was made"
        )
    # A text model has a pooling next; what it lacks is said where all models are checked.
    if "Pooling" not in kinds and (left_out := [kind for kind in kinds if kind not in _WITHOUT_EFFECT]):
        raise ValueError(
            f"name_or_path {name_or_path!r} is a model of sentence-transformers with {' and '.join(left_out)} behind "
            "its encoder, which a dual encoder of transformers has no place for; name the model from which it was made"
        )
    if place in ("", "."):
        return name_or_path
    if Path(place).is_absolute() or ".." in Path(place).parts:
        raise ValueError(f"name_or_path {name_or_path!r}: {MODULES_FILE} names a folder outside of it ({place!r})")
    if not Path(name_or_path).is_dir():
        name_or_path = snapshot_download(name_or_path, allow_patterns=[f"{place}/*"])
    folder = Path(name_or_path) / place
    if not folder.is_dir():
        raise OSError(f"name_or_path {name_or_path!r}: {MODULES_FILE} names the folder {place!r}, which is missing")
    return str(folder)
