"""Carries out a recipe of a distillation: data, encoders and trainer are built, trained, evaluated and saved."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import hf_dissect.distillation.encoders  # noqa: F401  (makes the small encoders known by their model_type)
from hf_dissect.data.loading import load_splits
from hf_dissect.distillation.data_collator import array_shape
from hf_dissect.distillation.encoders import standardisation
from hf_dissect.distillation.recipe import DistillationDataSection, DistillationRecipe, ModalitySection
from hf_dissect.distillation.trainer import DistillationTrainer
from hf_dissect.distillation.training_args import AuxiliaryDistillationArguments
from hf_dissect.distillation.training_data import Columns, check_lengths, column_names
from hf_dissect.models.tokenizer_training import train_tokenizer
from hf_dissect.runs.run import show_progress, train_to_end
from hf_dissect.training.checkpoints import find_checkpoint

VOCABULARY = 4096


def run_distillation(recipe: DistillationRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Train and evaluate as a recipe says and leave a complete run folder.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: there is no checkpoint to resume from, or settings and data do not fit.
    """
    checkpoint = find_checkpoint(recipe.output_dir) if resume else None
    splits = load_columns(recipe.data)
    trainer = build_trainer(recipe, splits)
    train_to_end(trainer, checkpoint)
    return trainer.finish(splits.get("test"))


def build_trainer(recipe: DistillationRecipe, splits: Mapping[str, Columns]) -> DistillationTrainer:
    """The trainer of a recipe, ready to train (`ValueError` when settings and data do not fit)."""
    arguments = AuxiliaryDistillationArguments(**recipe.training_arguments(), save_run_folder=False)
    wanted = recipe.modalities() if arguments.weights.needs_teacher else {recipe.student.column: recipe.student}
    encoders, processors = {}, {}
    for column, section in wanted.items():
        set_seed(arguments.seed)  # the weights of an encoder from scratch depend on the seed alone
        _check_column(column, splits["train"])
        encoders[column], processor = load_encoder(section, splits["train"])
        if processor is not None:
            processors[column] = processor
    trainer = DistillationTrainer(
        encoders.pop(recipe.student.column),
        arguments,
        encoders,
        splits["train"],
        splits.get("validation"),
        processors=processors,
        recipe=recipe,
    )
    show_progress(trainer)
    return trainer


def load_columns(section: DistillationDataSection) -> dict[str, Columns]:
    """The splits that a section describes: "train" and, where there are any, "validation" and "test"."""
    if section.source == "npz":
        splits: dict[str, Columns] = {"train": read_arrays(section.path)}
    else:
        names = ("source", "path", "name", "train_split", "validation_split", "test_split")
        given = {name: getattr(section, name) for name in names}
        if section.group_column is not None:
            given |= {"validation_split": None, "test_split": None}
        splits = load_splits(**given)
    if section.group_column is not None:
        splits = split_by_group(splits["train"], section)
    rows = {"train": section.max_train_rows}
    return {name: first_rows(part, rows.get(name, section.max_eval_rows)) for name, part in splits.items()}


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, or of the only one in a folder, by name; nothing in it is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or the folder has several.
    """
    files = sorted(Path(path).glob("*.npz")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"data.path {path!r}: there is no .npz file of arrays; name one, or a folder with one."
        )
    if len(files) > 1:
        raise ValueError(f"data.path {path!r} holds several .npz files; name one: {', '.join(f.name for f in files)}.")
    try:
        with np.load(files[0], allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"data.path {str(files[0])!r} is no file of plain arrays ({error}).") from error
    check_lengths(arrays, f"data.path {str(files[0])!r}: the arrays")
    return arrays


def split_by_group(columns: Columns, section: DistillationDataSection) -> dict[str, Columns]:
    """The rows whose group is among those of each split."""
    _check_column(section.group_column, columns, "data.group_column")
    values = np.asarray(columns[section.group_column]).tolist()
    splits = {}
    for name in ("train", "validation", "test"):
        groups = getattr(section, f"{name}_groups")
        if absent := [group for group in groups if group not in values]:
            known = ", ".join(map(str, sorted(set(values), key=str)[:20]))
            raise ValueError(
                f"data.{name}_groups: no row has {absent[0]!r} in {section.group_column}; there are {known}."
            )
        if groups:
            splits[name] = rows_of_groups(columns, section.group_column, groups)
    return splits


def rows_of_groups(columns: Columns, group_column: str, groups: list[Any]) -> Columns:
    """The rows whose value in a column is one of `groups`."""
    values = np.asarray(columns[group_column]).tolist()
    return _take(columns, [row for row, value in enumerate(values) if value in groups])


def load_encoder(section: ModalitySection, columns: Columns) -> tuple[PreTrainedModel, Any]:
    """The encoder of a modality, and its image processor or tokenizer; None for arrays.

    Of a dual encoder such as CLIP the tower is taken that reads the kind of modality.
    """
    values = columns[section.column]
    if section.config is not None:
        return _from_scratch(section, values)
    options = {"trust_remote_code": section.trust_remote_code}
    model = AutoModel.from_pretrained(section.name_or_path, dtype=torch.float32, **options)
    towers = {"image": "vision_model", "text": "text_model"}
    if section.kind in towers and hasattr(model.config, "vision_config"):
        model = getattr(model, towers[section.kind])
    return model, _processor_of(section, section.processor or section.name_or_path)


def _from_scratch(section: ModalitySection, values: Any) -> tuple[PreTrainedModel, Any]:
    settings = dict(section.config)
    if settings["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"{section.column}: config.model_type {settings['model_type']!r} is no architecture known.")
    processor = _processor_of(section, section.processor) if section.processor else None
    if section.kind == "text":
        texts = (value[0] if isinstance(value, list) and value else value for value in values)
        texts = [text for text in texts if isinstance(text, str)]
        processor = processor or train_tokenizer(texts, settings["model_type"], settings.get("vocab_size", VOCABULARY))
        settings |= {"vocab_size": len(processor)} | {
            name: getattr(processor, name)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id")
            if getattr(processor, name) is not None
        }
        processor.model_max_length = settings.get("max_position_embeddings", processor.model_max_length)
    config = AutoConfig.for_model(**settings)
    if section.kind == "image" and processor is None:
        side = getattr(config, "image_size", 224)
        processor = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    if section.kind == "array" and section.standardise and hasattr(config, "input_mean"):
        for name, numbers in _standardisation(values, config.num_channels, section.column).items():
            setattr(config, name, numbers)
    return AutoModel.from_config(config), processor


def _processor_of(section: ModalitySection, source: str) -> Any:
    return None if section.kind == "array" else load_processor(section.kind, source, section.trust_remote_code)


def load_processor(kind: str, source: str, trust_remote_code: bool = False) -> Any:
    """The image processor (`kind` "image") or tokenizer ("text") in a folder or a repository of the Hub."""
    loader = AutoImageProcessor if kind == "image" else AutoTokenizer
    options = {"backend": "pil"} if "backend" in inspect.signature(loader.from_pretrained).parameters else {}
    return loader.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def _standardisation(values: Any, num_channels: int, column: str) -> dict[str, list[float]]:
    shape = array_shape(values, column)
    arrays = [np.asarray(value, np.float32) for value in values if value is not None]
    sound = [array for array in arrays if array.shape == shape and np.isfinite(array).all()]
    if not sound or np.prod(shape) % num_channels:
        raise ValueError(f"{column}: arrays of {shape} have no {num_channels} channels; mend config.num_channels.")
    return standardisation(torch.from_numpy(np.stack(sound)), num_channels)


def _check_column(column: str, columns: Columns, key: str = "the recipe") -> None:
    names = column_names(columns)
    if column not in names:
        raise ValueError(f"{key}: there is no column {column!r}; there are {', '.join(map(repr, names))}.")


def _take(columns: Columns, rows: list[int]) -> Columns:
    if isinstance(columns, Dataset):
        return columns.select(rows)
    return {name: values[rows] for name, values in columns.items()}


def first_rows(columns: Columns, count: int | None) -> Columns:
    """The first `count` rows; None: all."""
    length = len(columns) if isinstance(columns, Dataset) else len(next(iter(columns.values())))
    return columns if count is None or count >= length else _take(columns, list(range(count)))
