"""Carries out a recipe: data, model and trainer are built from its sections, trained, evaluated and saved."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from hf_dissect.data import PairDataset, as_pairs, load_splits, make_scene_classes
from hf_dissect.evaluation import evaluate_zero_shot
from hf_dissect.models.adapters import add_adapter
from hf_dissect.models.loading import freeze_tower, list_networks, load_model_and_processor
from hf_dissect.models.twin_encoder import TwinDualEncoder
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.recipe import DataSection, ModelSection, Recipe, ZeroShotSection
from hf_dissect.runs.saved_model import load_split
from hf_dissect.trainer import DissectTrainer
from hf_dissect.training.checkpoints import find_checkpoint
from hf_dissect.training.progress import RunProgress
from hf_dissect.training_args import DissectTrainingArguments

logger = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 200_000

_AnyRecipe = TypeVar("_AnyRecipe", bound=RecipeFile)


def load_data(recipe: Recipe) -> dict[str, Any]:
    """The splits that the recipe's data section describes, as tables: "train" and, where there are any, the others."""
    return load_splits(**dataclasses.asdict(recipe.data))


def build_trainer(recipe: Recipe, splits: Mapping[str, Any] | None = None) -> DissectTrainer:
    """The trainer of a recipe, ready to train.

    Args:
        recipe: what to build.
        splits: of `load_data`, when they are at hand already.

    Raises:
        ValueError: settings and data do not fit, see `DissectTrainer`, `load_splits` and `load_model_and_processor`.
    """
    arguments = DissectTrainingArguments(**recipe.training_arguments(), save_run_folder=False)
    splits = load_data(recipe) if splits is None else splits
    pairs = {split: as_pairs(rows, **arguments.column_names()) for split, rows in splits.items()}
    # The weights of a model from scratch depend on the seed alone, not on what ran before in this process.
    transformers.set_seed(arguments.seed)
    model, processor = _model_and_processor(recipe, _captions(pairs["train"]))
    try:
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


def _model_and_processor(recipe: Recipe, captions: Iterable[str]) -> tuple[Any, Any]:
    # With an adapter frozen last: no adapter is put into the tower, and none may train its weights.
    section = recipe.model if recipe.adapter is None else dataclasses.replace(recipe.model, freeze=None)
    model, processor = _load(section, captions)
    if recipe.adapter is not None:
        return add_adapter(model, recipe.adapter, recipe.model.freeze), processor
    if recipe.objective.gsc is not None and recipe.objective.gsc.dual:
        return _twins(model, recipe.model), processor
    return model, processor


def _load(section: ModelSection, captions: Iterable[str] | None = None) -> tuple[Any, Any]:
    arguments = dataclasses.asdict(section)
    del arguments["second_name_or_path"]
    return load_model_and_processor(**arguments, captions=captions)


def _twins(first: Any, section: ModelSection) -> Any:
    """The model with a second one beside it that starts differently; a saved pair of twins goes on as it is."""
    if len(list_networks(first)) == 2:
        return first
    if section.config is not None:
        second = type(first)(first.config).eval()
        if section.freeze:
            freeze_tower(second, section.freeze)
    elif section.second_name_or_path and section.second_name_or_path != section.name_or_path:
        second, _ = _load(dataclasses.replace(section, name_or_path=section.second_name_or_path))
    else:
        raise ValueError(
            f"objective.gsc.dual: both networks would start as {section.name_or_path} and stay the same; name another "
            "trained model of the same tokens and image size with model.second_name_or_path, or set it to false."
        )
    return TwinDualEncoder.of(first, second)


def run_recipe(
    recipe: Recipe,
    splits: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train and evaluate as a recipe says and leave a complete run folder.

    Args:
        recipe: what to run; its `output_dir` is the run folder.
        splits: of `load_data`, when they are at hand already.
        name: of the run in its report; the strategy's by default.
        resume: continue from the folder's last complete checkpoint.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: there is no checkpoint to resume from, or see `build_trainer`.
    """
    checkpoint = find_checkpoint(recipe.output_dir) if resume else None
    splits = load_data(recipe) if splits is None else splits
    trainer = build_trainer(recipe, splits)
    processor = trainer.processing_class
    train_to_end(trainer, checkpoint)

    def zero_shot() -> dict[str, float]:
        section = recipe.evaluation.zero_shot
        with trainer.times.measure("evaluation"):
            return {} if section is None else zero_shot_figures(trainer.model, processor, section, recipe)

    return trainer.finish(
        splits.get("test"),
        name=name,
        more_figures=zero_shot,
        retrieval=recipe.evaluation.retrieval,
        noise_detection=recipe.evaluation.noise_detection,
    )


def show_progress(trainer: Trainer) -> None:
    """Give a trainer one bar for the whole run in place of its own, where bars are wanted."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RunProgress())


def train_to_end(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if one is given; an error closes the bar of `show_progress`."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        if (progress := trainer.pop_callback(RunProgress)) is not None:
            progress.close()  # left open, the bar would be drawn once more behind the error
        raise


def zero_shot_figures(model: Any, processor: Any, section: ZeroShotSection, recipe: Recipe) -> dict[str, float]:
    """Zero-shot accuracies `zero_shot_*` as the recipe's section asks for."""
    if section.path is None:
        rows = make_scene_classes(
            recipe.data.scenes_test, seed=recipe.data.scenes_seed, image_size=recipe.data.scenes_image_size
        )
    else:
        rows = load_split(DataSection(source=section.source, path=section.path), section.split)
    figures = evaluate_zero_shot(
        model, processor, rows, section.classes, section.templates, section.image_column, section.label_column
    )
    return {f"zero_shot_{key}": value for key, value in figures.items()}


def free_output_dir(recipe: _AnyRecipe) -> _AnyRecipe:
    """The recipe, moved to `<output_dir>-2`, `-3`, ... when its folder already holds a run: none is overwritten."""
    folder = Path(recipe.output_dir)
    free = first_free(folder, holds_a_run)
    if free == folder:
        return recipe
    logger.warning("%s already holds a run; this one goes to %s.", folder, free)
    return in_folder(recipe, free)


def first_free(folder: Path, is_taken: Callable[[Path], bool]) -> Path:
    """The folder itself, or the first of `<folder>-2`, `-3`, ... that is not taken."""
    names = itertools.chain([folder], (Path(f"{folder}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not is_taken(path))


def in_folder(recipe: _AnyRecipe, folder: str | Path) -> _AnyRecipe:
    """The recipe, with `folder` as its run folder."""
    replaced: Any = recipe  # a dataclass, which its base is not
    return dataclasses.replace(replaced, training=recipe.training | {"output_dir": str(folder)})


def holds_a_run(folder: Path) -> bool:
    """Whether a folder has a finished run or a checkpoint in it."""
    return (folder / "metrics.json").exists() or any(folder.glob("checkpoint-*"))


def _captions(pairs: Any):
    if isinstance(pairs, PairDataset):
        return pairs.captions()
    captions = (pair["caption"] for pair in pairs)
    return itertools.islice((text for text in captions if isinstance(text, str)), CAPTIONS_FOR_TOKENIZER)
