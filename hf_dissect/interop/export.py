"""Export of a trained run to a folder that another library loads, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_dissect.data.tasks import read_task_names
from hf_dissect.interop.sentence_files import describe_encoder, find_hindrance, write_sentence_files
from hf_dissect.models.loading import find_max_text_length, load_model_and_processor
from hf_dissect.models.merging import fix_task, merge_adapter
from hf_dissect.models.open_clip.configuration import NotConvertible, describe_config
from hf_dissect.models.open_clip.loading import CONFIG_FILE, WEIGHTS_FILE
from hf_dissect.models.open_clip.processors import describe_image_processor, has_clip_vocabulary
from hf_dissect.models.open_clip.weights import to_open_clip

FORMATS = ("sentence-transformers", "open_clip")


def export_run(
    run: str | Path,
    folder: str | Path,
    format: str,
    *,
    task: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the model of a run in the form of another library; an adapter is merged into its base.

    Args:
        run: Folder of a run or of one of its checkpoints, or Hub id of any dual encoder.
        folder: Folder to write, which must not exist or be empty.
        format: `"sentence-transformers"` or `"open_clip"`.
        task: Task whose experts are merged, by name or number, for a MoLA adapter with an expert for each.
        repo_id: Repository that the folder will be published in, which open_clip's configuration names for the
            tokenizer; None for a folder that is loaded from a disk.

    Returns:
        The folder.

    Raises:
        ValueError: The other library cannot load such a model, an argument is wrong, or the folder is taken. Nothing
            is written then.
        OSError: A file cannot be read or written.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} is not empty; name a new folder for the export, or empty this one.")
    model, processor = load_model_and_processor(name_or_path=str(run))
    try:
        fix_task(model, task, read_task_names(run))
        merged: Any = merge_adapter(model)
        write = _prepare_open_clip if format == "open_clip" else _prepare_sentence_transformers
        write_files = write(merged, processor, repo_id or target.name)
    except ValueError as error:
        raise ValueError(f"{run} cannot be exported to {format}: {error}") from error
    write_whole(target, write_files)
    return target


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name and rename it, so that no reader finds a part of it.

    Args:
        target: Folder that does not exist or is empty.
        write: Function that writes the files into the folder that it is given.
    """
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
    try:
        temporary.chmod(0o777 & ~_read_umask())  # mkdtemp lets nobody else in
        write(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _prepare_sentence_transformers(model: PreTrainedModel, processor: Any, repo_id: str) -> Callable[[Path], None]:
    if (hindrance := find_hindrance(model)) is not None:
        raise ValueError(
            f"it has {hindrance}; sentence-transformers loads the run folder itself, where hf_dissect is installed, "
            "with trust_remote_code=True"
        )
    if not describe_encoder(model, processor):
        raise ValueError("it reads stored features in place of pictures or captions")

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_sentence_files(folder, model, processor)

    return write


def _prepare_open_clip(model: PreTrainedModel, processor: Any, repo_id: str) -> Callable[[Path], None]:
    config: Any = model.config
    if config.model_type not in ("clip", "siglip"):
        raise NotConvertible(f"it is of type {config.model_type!r}, and open_clip has 'clip' and 'siglip'")
    tokenizer, length = processor.tokenizer, find_max_text_length(model, processor)
    described = describe_config(config, length, max(tokenizer.get_vocab().values()))
    preprocess = describe_image_processor(processor.image_processor, config.vision_config.image_size)
    if not has_clip_vocabulary(tokenizer):  # which open_clip brings along
        described["text_cfg"]["hf_tokenizer_name"] = repo_id
    weights = to_open_clip(model.state_dict(), config, length)

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        content = json.dumps({"model_cfg": described, "preprocess_cfg": preprocess}, indent=2)
        (folder / CONFIG_FILE).write_text(content + "\n", encoding="utf-8")

    return write
