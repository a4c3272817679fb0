"""Training and evaluation of a dual encoder as a recipe says."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig
from transformers.trainer_utils import IntervalStrategy

from hf_dissect.data import PairDataset, as_pairs, load_splits
from hf_dissect.data.stored_features import find_feature_sizes
from hf_dissect.evaluation.passes import show_pass
from hf_dissect.evaluation.recall import RETRIEVAL_FIGURES
from hf_dissect.models.adapters import add_adapter
from hf_dissect.models.loading import freeze_tower, list_networks, load_model_and_processor
from hf_dissect.models.twin_encoder import TwinDualEncoder
from hf_dissect.recipe.recipe import DataSection, ModelSection, Recipe
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
from hf_dissect.runs.zero_shot import compute_zero_shot_figures, load_labelled_images
from hf_dissect.trainer import DissectTrainer
from hf_dissect.training.checkpoints import find_checkpoint
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import wrap_pairs

__all__ = ["build_trainer", "compute_zero_shot_figures", "load_data", "run_recipe"]

logger = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 200_000
"""Largest number of captions of a stream from which a tokenizer is trained."""


def run_recipe(
    recipe: Recipe,
    splits: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train and evaluate as a recipe says, and leave a complete run folder.

    All that the recipe names is checked before the first step.

    Args:
        recipe: Recipe of the run; its `output_dir` is the run folder.
        splits: Splits by name, as from `load_data`; None to load them.
        name: Name of the run in its report; None for that of the strategy.
        resume: True to continue from the last complete checkpoint in the run folder.
        overwrite: True to remove what an earlier run left in the run folder, when training begins.

    Returns:
        The content of `metrics.json`.

    Raises:
        HubUnreachable: The Hub is needed, and does not answer.
        ValueError: There is no checkpoint to resume from, the folder holds a model of another program, or settings and
            data do not fit, see `build_trainer`.
    """
    checkpoint = find_checkpoint(recipe.output_dir) if resume else None
    check_surroundings(recipe)
    if checkpoint is None:
        check_run_folder(recipe, overwrite=overwrite)
    section = recipe.evaluation.zero_shot
    images = None if section is None else load_labelled_images(section, recipe)
    splits = load_data(recipe) if splits is None else splits
    trainer = build_trainer(recipe, splits, checkpoint)
    processor = trainer.processing_class
    wrap_pairs("test_dataset", splits.get("test"), trainer.args, trainer.data_collator)
    check_disk_space(trainer.model, trainer.args)
    if overwrite and checkpoint is None:
        remove_results(Path(recipe.output_dir))

    def evaluate_classes() -> dict[str, float]:
        with trainer.times.measure("evaluation"):
            return (
                {} if section is None else compute_zero_shot_figures(trainer.model, processor, section, recipe, images)
            )

    with trainer.stop_request.listen():  # also between the last step and the final figures
        train_to_end(trainer, checkpoint)
        return trainer.finish(
            splits.get("test"),
            name=name,
            more_figures=None if section is None else evaluate_classes,
            retrieval=recipe.evaluation.retrieval,
            noise_detection=recipe.evaluation.noise_detection,
        )


def load_data(recipe: Recipe) -> dict[str, Any]:
    """Load the splits of a recipe as tables, by name: "train" and, if there are any, "validation" and "test"."""
    return load_splits(**dataclasses.asdict(recipe.data))


def build_trainer(
    recipe: Recipe, splits: Mapping[str, Any] | None = None, checkpoint: Path | None = None
) -> DissectTrainer:
    """Build the trainer of a recipe, ready to train.

    Args:
        recipe: Recipe of the run.
        splits: Splits by name, as from `load_data`; None to load them.
        checkpoint: Checkpoint that the run will resume from; None to start.

    Raises:
        ValueError: Settings and data do not fit, see `DissectTrainer`, `load_splits` and `load_model_and_processor`.
    """
    with name_training_keys(recipe.training):
        arguments = DissectTrainingArguments(**recipe.training_arguments(), save_run_folder=False)
    check_best_metric(arguments, RETRIEVAL_FIGURES)
    splits = load_data(recipe) if splits is None else splits
    check_splits(splits, _list_named_splits(recipe.data), IntervalStrategy(arguments.eval_strategy).value)
    if recipe.evaluation.retrieval and not {"validation", "test"} & {*splits}:
        logger.warning(
            "evaluation.retrieval: the data have a train split only, so there will be no retrieval figures."
        )
    columns = {split: arguments.column_names() for split in splits} | {"train": arguments.training_columns()}
    pairs = {split: as_pairs(rows, **columns[split]) for split, rows in splits.items()}
    # The weights of a model from scratch depend on the seed alone, not on what ran before in this process.
    transformers.set_seed(arguments.seed)
    model, processor = _load_model_and_processor(recipe, pairs["train"], checkpoint)
    check_optimizer(arguments, model)
    try:
        with name_training_keys(recipe.training):
            trainer = DissectTrainer(
                model=model,
                args=arguments,
                train_dataset=pairs["train"],
                eval_dataset=pairs.get("validation"),
                processing_class=processor,
                recipe=recipe,
            )
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        raise ValueError(f"training.report_to={arguments.report_to}: {error}") from error  # a tracker is missing
    show_progress(trainer)
    return trainer


def _list_named_splits(data: DataSection) -> dict[str, str | None]:
    """Return the names of the splits that a recipe sets itself, since data without the usual ones are sound."""
    if data.source == "scenes":
        return {}
    named = {split: getattr(data, f"{split}_split") for split in ("validation", "test")}
    return {split: name for split, name in named.items() if name != split}


def _load_model_and_processor(recipe: Recipe, pairs: Any, checkpoint: Path | None) -> tuple[Any, Any]:
    # With an adapter, `add_adapter` freezes the tower: it puts no adapter there, and lets none of its weights train.
    section = recipe.model if recipe.adapter is None else dataclasses.replace(recipe.model, freeze=None)
    model, processor = _load_section(section, pairs)
    if recipe.adapter is not None:
        return add_adapter(model, _add_saved_router(recipe.adapter, checkpoint), recipe.model.freeze), processor
    if recipe.objective.gsc is not None and recipe.objective.gsc.dual:
        return _make_twins(model, recipe.model, pairs), processor
    return model, processor


def _add_saved_router(adapter: Mapping[str, Any], checkpoint: Path | None) -> Mapping[str, Any]:
    """Return settings of an adapter that name the network of its router, where only the checkpoint says which it is.

    The default of this setting has changed; a run keeps the network that it started with.
    """
    if adapter["type"] != "mola" or checkpoint is None:
        return adapter
    try:
        saved = PeftConfig.from_pretrained(str(checkpoint))
    except (OSError, ValueError, TypeError, KeyError):
        return adapter  # what is wrong with the checkpoint is reported when it is loaded
    return {"router_architecture": getattr(saved, "router_architecture", None), **adapter}


def _load_section(section: ModelSection, pairs: Any) -> tuple[Any, Any]:
    arguments = dataclasses.asdict(section)
    del arguments["second_name_or_path"], arguments["check_reload"], arguments["caption_lengths"]
    sizes = find_feature_sizes(pairs) if section.vision is not None else None
    return load_model_and_processor(**arguments, captions=_read_captions(pairs), feature_sizes=sizes)


def _make_twins(first: Any, section: ModelSection, pairs: Any) -> Any:
    """Return the model together with a second one that starts differently; saved twins are returned as they are."""
    if len(list_networks(first)) == 2:
        return first
    if section.config is not None:
        second = type(first)(first.config).eval()
        if section.freeze:
            freeze_tower(second, section.freeze)
    elif section.vision is not None:
        second, _ = _load_section(section, pairs)  # the same towers behind other projections
    elif section.second_name_or_path and section.second_name_or_path != section.name_or_path:
        second, _ = _load_section(dataclasses.replace(section, name_or_path=section.second_name_or_path), pairs)
    else:
        raise ValueError(
            f"objective.gsc.dual: both networks would start as {section.name_or_path} and stay the same; name another "
            "trained model of the same tokens and image size with model.second_name_or_path, or set it to false."
        )
    return TwinDualEncoder.of(first, second)


def _read_captions(pairs: Any) -> Iterable[str]:
    return show_pass(_list_captions(pairs), "captions for the tokenizer", unit="caption")


def _list_captions(pairs: Any) -> Iterable[str]:
    if isinstance(pairs, PairDataset):
        return pairs.captions()
    captions = (pair["caption"] for pair in pairs)
    return itertools.islice((text for text in captions if isinstance(text, str)), CAPTIONS_FOR_TOKENIZER)
