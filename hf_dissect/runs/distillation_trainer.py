"""The trainer of a distillation's recipe, with the encoders that its sections name."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
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
from hf_dissect.distillation.data_collator import find_array_shape
from hf_dissect.distillation.encoders import standardisation
from hf_dissect.distillation.evaluation import list_figures
from hf_dissect.distillation.recipe import DistillationRecipe, ModalitySection
from hf_dissect.distillation.trainer import DistillationTrainer
from hf_dissect.distillation.training_args import DistillationTrainingArguments
from hf_dissect.distillation.training_data import Columns, check_column, list_columns
from hf_dissect.models.tokenizer_training import train_tokenizer
from hf_dissect.runs.before_training import check_best_metric, check_optimizer, check_splits, name_training_keys
from hf_dissect.runs.training import show_progress

VOCABULARY = 4096
"""Size of the vocabulary of a tokenizer trained here, unless the configuration says another."""


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
        check_column(column, splits["train"])
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
