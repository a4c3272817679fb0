"""Training and evaluation of a student as the recipe of a distillation says."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

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
from transformers.trainer_utils import IntervalStrategy

import hf_dissect.distillation.encoders  # noqa: F401  (registers the small encoders by their model_type)
from hf_dissect.data.loading import load_splits
from hf_dissect.distillation.data_collator import find_array_shape
from hf_dissect.distillation.encoders import standardisation
from hf_dissect.distillation.evaluation import list_figures
from hf_dissect.distillation.recipe import DistillationDataSection, DistillationRecipe, ModalitySection
from hf_dissect.distillation.trainer import DistillationTrainer
from hf_dissect.distillation.training_args import DistillationTrainingArguments
from hf_dissect.distillation.training_data import Columns, check_lengths, list_columns
from hf_dissect.models.tokenizer_training import train_tokenizer
from hf_dissect.runs.before_training import (
    check_best_metric,
    check_disk_space,
    check_optimizer,
    check_splits,
    check_surroundings,
    name_training_keys,
)
from hf_dissect.runs.output_folder import check_run_folder, remove_results
from hf_dissect.runs.training import show_progress, train_to_end
from hf_dissect.training.checkpoints import find_checkpoint

VOCABULARY = 4096
"""Size of the vocabulary of a tokenizer trained here, unless the configuration says another."""


def run_distillation(recipe: DistillationRecipe, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train and evaluate as a recipe says, and leave a complete run folder.

    Args:
        recipe: Recipe of the run; its `output_dir` is the run folder.
        resume: True to continue from the last complete checkpoint in the run folder.
        overwrite: True to remove what an earlier run left in the run folder, when training begins.

    Returns:
        The content of `metrics.json`.

    Raises:
        HubUnreachable: The Hub is needed, and does not answer.
        ValueError: There is no checkpoint to resume from, the folder holds a model of another program, or settings and
            data do not fit.
    """
    checkpoint = find_checkpoint(recipe.output_dir) if resume else None
    check_surroundings(recipe)
    if checkpoint is None:
        check_run_folder(recipe, overwrite=overwrite)
    splits = load_columns(recipe.data)
    trainer = build_trainer(recipe, splits)
    check_disk_space(trainer.model, trainer.args)
    if overwrite and checkpoint is None:
        remove_results(Path(recipe.output_dir))
    with trainer.stop_request.listen():  # also between the last step and the final figures
        train_to_end(trainer, checkpoint)
        return trainer.finish(splits.get("test"))


def build_trainer(recipe: DistillationRecipe, splits: Mapping[str, Columns]) -> DistillationTrainer:
    """Build the trainer of a recipe, ready to train.

    Args:
        recipe: Recipe of the run.
        splits: Splits by name, as from `load_columns`.

    Raises:
        ValueError: Settings and data do not fit.
    """
    with name_training_keys(recipe.training):
        arguments = DistillationTrainingArguments(**recipe.training_arguments(), save_run_folder=False)
    check_splits(splits, {}, IntervalStrategy(arguments.eval_strategy).value)
    student, *auxiliaries = recipe.modalities()
    wanted = [student, *(auxiliaries if arguments.weights.needs_teacher else ())]
    evaluated = list_columns(splits["validation"]) if "validation" in splits else None
    figures = list_figures(wanted, evaluated, auxiliary_task=bool(arguments.weights.auxiliary_task))
    check_best_metric(arguments, figures)
    encoders, processors = {}, {}
    for column in wanted:
        set_seed(arguments.seed)  # the weights of an encoder from scratch depend on the seed alone
        _check_column(column, splits["train"])
        encoders[column], processor = load_encoder(recipe.modalities()[column], column, splits["train"][column])
        if processor is not None:
            processors[column] = processor
    with name_training_keys(recipe.training):
        trainer = DistillationTrainer(
            encoders.pop(student),
            arguments,
            encoders,
            splits["train"],
            splits.get("validation"),
            processors=processors,
            recipe=recipe,
        )
    check_optimizer(arguments, trainer.model)
    show_progress(trainer)
    return trainer


def load_columns(section: DistillationDataSection) -> dict[str, Columns]:
    """Load the splits of a data section by name: "train" and, if there are any, "validation" and "test"."""
    if section.source == "npz":
        splits: dict[str, Columns] = {"train": read_arrays(cast(str, section.path))}  # a checked recipe has a path
    else:
        names = ["source", "path", "name", "train_split", "validation_split", "test_split"]
        names += ["separator", "encoding", "image_root"]
        given = {name: getattr(section, name) for name in names}
        if section.group_column is not None:
            given |= {"validation_split": None, "test_split": None}
        splits = load_splits(**given)
    if section.group_column is not None:
        splits = split_by_group(splits["train"], section, section.group_column)
    limits = {"train": section.max_train_rows}
    return {name: take_first_rows(part, limits.get(name, section.max_eval_rows)) for name, part in splits.items()}


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file without unpickling anything.

    Args:
        path: File of arrays (.npz), or folder with one.

    Returns:
        Arrays of equal length, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, the lengths differ, or the folder has several files of arrays.
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
        raise ValueError(f"data.path {str(files[0])!r} is not a file of plain arrays ({error}).") from error
    check_lengths(arrays, f"data.path {str(files[0])!r}: the arrays")
    return arrays


def split_by_group(columns: Columns, section: DistillationDataSection, group_column: str) -> dict[str, Columns]:
    """Split rows by the group that they belong to.

    Args:
        columns: Data to split.
        section: Data section that lists the groups of each split.
        group_column: Column of the groups.

    Returns:
        Splits by name; a split without groups is left out.

    Raises:
        ValueError: There is no such column, or a group has no row.
    """
    _check_column(group_column, columns, "data.group_column")
    values = np.asarray(columns[group_column]).tolist()
    splits = {}
    for name in ("train", "validation", "test"):
        groups = getattr(section, f"{name}_groups")
        if absent := [group for group in groups if group not in values]:
            known = ", ".join(map(str, sorted(set(values), key=str)[:20]))
            raise ValueError(f"data.{name}_groups: no row has {absent[0]!r} in {group_column}; there are {known}.")
        if groups:
            splits[name] = select_groups(columns, group_column, groups)
    return splits


def select_groups(columns: Columns, group_column: str, groups: list[Any]) -> Columns:
    """Return the rows that have one of `groups` in the column of the groups."""
    values = np.asarray(columns[group_column]).tolist()
    return _select_rows(columns, [row for row, value in enumerate(values) if value in groups])


def take_first_rows(columns: Columns, count: int | None) -> Columns:
    """Return the first `count` rows, or all rows if `count` is None."""
    length = len(columns) if isinstance(columns, Dataset) else len(next(iter(columns.values())))
    return columns if count is None or count >= length else _select_rows(columns, list(range(count)))


def load_encoder(section: ModalitySection, column: str, values: Any) -> tuple[PreTrainedModel, Any]:
    """Load the encoder of a modality, or build it if the section has its configuration.

    Args:
        section: Section of the modality. If it names a dual encoder such as CLIP, the tower for its kind is taken.
        column: Column of the modality.
        values: Values of the column in the training data.

    Returns:
        The encoder, and its image processor or tokenizer; None for arrays.

    Raises:
        ValueError: The configuration does not fit the values, or is of an unknown architecture.
    """
    if section.config is not None:
        return _build_encoder(section, section.config, column, values)
    source = cast(str, section.name_or_path)  # a checked recipe has either this or a configuration
    model = AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=section.trust_remote_code)
    towers = {"image": "vision_model", "text": "text_model"}
    if section.kind in towers and hasattr(model.config, "vision_config"):
        model = getattr(model, towers[section.kind])
    return model, _load_processor(section, section.processor or source)


def load_processor(kind: str, source: str, trust_remote_code: bool = False) -> Any:
    """Load an image processor or a tokenizer.

    Args:
        kind: "image" for an image processor, "text" for a tokenizer.
        source: Folder, or Hub id.
        trust_remote_code: True to allow code from the repository to run.
    """
    loader = AutoImageProcessor if kind == "image" else AutoTokenizer
    options = {"backend": "pil"} if "backend" in inspect.signature(loader.from_pretrained).parameters else {}
    return loader.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def _build_encoder(
    section: ModalitySection, settings: dict[str, Any], column: str, values: Any
) -> tuple[PreTrainedModel, Any]:
    settings = dict(settings)
    if settings["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"{column}: config.model_type {settings['model_type']!r} is not a known architecture.")
    processor = _load_processor(section, section.processor) if section.processor else None
    if section.kind == "text":
        processor = processor or _train_tokenizer(settings, values)
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        settings |= {"vocab_size": len(processor)}
        settings |= {name: getattr(processor, name) for name in special if getattr(processor, name) is not None}
        processor.model_max_length = settings.get("max_position_embeddings", processor.model_max_length)
    config = AutoConfig.for_model(**settings)
    if section.kind == "image" and processor is None:
        side = getattr(config, "image_size", 224)
        processor = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    if section.kind == "array" and section.standardise and hasattr(config, "input_mean"):
        for name, numbers in _compute_standardisation(values, config.num_channels, column).items():
            setattr(config, name, numbers)
    return AutoModel.from_config(config), processor


def _train_tokenizer(settings: dict[str, Any], values: Any) -> Any:
    captions = (value[0] if isinstance(value, list) and value else value for value in values)
    texts = [text for text in captions if isinstance(text, str)]
    return train_tokenizer(texts, settings["model_type"], settings.get("vocab_size", VOCABULARY))


def _load_processor(section: ModalitySection, source: str) -> Any:
    return None if section.kind == "array" else load_processor(section.kind, source, section.trust_remote_code)


def _compute_standardisation(values: Any, num_channels: int, column: str) -> dict[str, list[float]]:
    shape = find_array_shape(values, column)
    arrays = [np.asarray(value, np.float32) for value in values if value is not None]
    sound = [array for array in arrays if array.shape == shape and np.isfinite(array).all()]
    if not sound or np.prod(shape) % num_channels:
        raise ValueError(f"{column}: arrays of {shape} have no {num_channels} channels; mend config.num_channels.")
    return standardisation(torch.from_numpy(np.stack(sound)), num_channels)


def _check_column(column: str, columns: Columns, key: str = "the recipe") -> None:
    names = list_columns(columns)
    if column not in names:
        raise ValueError(f"{key}: there is no column {column!r}; there are {', '.join(map(repr, names))}.")


def _select_rows(columns: Columns, rows: list[int]) -> Columns:
    if isinstance(columns, Dataset):
        return columns.select(rows)
    return {name: cast(Any, values)[rows] for name, values in columns.items()}
