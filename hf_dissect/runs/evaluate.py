"""Retrieval and zero-shot figures of a saved model on any image-text or labelled data."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from hf_dissect.data import as_pairs
from hf_dissect.data.pair_columns import CAPTION_COLUMNS
from hf_dissect.data.tasks import number_tasks_as_saved
from hf_dissect.evaluation import evaluate_zero_shot
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.hub.pull import download_model, pull_recipe
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.recipe.recipe import DataSection, Recipe, RecipeError
from hf_dissect.runs.run import load_split, zero_shot_figures
from hf_dissect.trainer import DissectTrainer
from hf_dissect.training.run_folder import without_speed
from hf_dissect.training_args import DissectTrainingArguments

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def evaluate_checkpoint(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    caption_column: str | None = None,
    task_column: str | None = None,
    label_column: str = "label",
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    image_features: str | None = None,
    max_rows: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Evaluate a checkpoint.

    Args:
        checkpoint: run folder, `checkpoint-N` folder, Hub id, or `hub:USER/REPO` to have the recipe there as well.
        data: "scenes", a local folder or file, tar shards, or a Hub data set id; None for the data of the recipe that
            lies in the checkpoint's folder.
        split: of the data.
        image_column, caption_column: names of the columns; None for the usual ones.
        task_column: of the tasks, for an adapter that routes by them; None for that of the recipe, with its own data.
            Without tasks such an adapter is evaluated as the mean of its experts.
        label_column: of labelled images.
        classes: class names; None for those of the label column, if it has names.
        templates: captions of a class, with `{}` for its name.
        image_features: `.npz` of stored features, for models that read those.
        max_rows: evaluate the first rows only.
        batch_size: pairs a forward pass.
        num_workers: processes that decode.

    Returns:
        Retrieval figures where the data have captions, `zero_shot_*` where they have labels and class names.

    Raises:
        ValueError: the data have neither, or there is no recipe to take the data from.
    """
    recipe = recipe_of(checkpoint) if data is None else None
    if is_hub_address(checkpoint):
        checkpoint = str(download_model(HubAddress.parse(checkpoint)))
    section = data_section(checkpoint, data, recipe)
    section = dataclasses.replace(
        section,
        image_column=image_column or section.image_column,
        caption_column=caption_column or section.caption_column,
        task_column=task_column or section.task_column,
        image_features=image_features or section.image_features,
        max_train_rows=max_rows or section.max_train_rows,  # data without splits are all train
        max_eval_rows=max_rows or section.max_eval_rows,
        noise_rate=0.0,
        noise_permutation=None,
    )
    rows = load_split(section, split, whole=data is not None)
    model, processor = load_model_and_processor(name_or_path=checkpoint)
    figures: dict[str, float] = {}
    if _has_captions(rows, section.caption_column):
        figures.update(_retrieval(checkpoint, model, processor, rows, section, batch_size, num_workers))
    names = classes or _class_names(rows, label_column)
    if names:
        zero_shot = evaluate_zero_shot(
            model, processor, rows, names, templates, section.image_column or "image", label_column, batch_size
        )
        figures.update({f"zero_shot_{key}": value for key, value in zero_shot.items()})
    elif data is None and recipe is not None and recipe.evaluation.zero_shot is not None:
        figures.update(zero_shot_figures(model, processor, recipe.evaluation.zero_shot, recipe))
    if not figures:
        raise ValueError(
            f"The data have neither captions nor labels with class names (columns: {', '.join(rows.column_names)}); "
            "name them with --caption-column, or --label-column and --classes."
        )
    return figures


def _retrieval(
    checkpoint: str, model, processor, rows, section: DataSection, batch_size: int, num_workers: int
) -> dict[str, float]:
    with evaluating_trainer(checkpoint, model, processor, rows, section, batch_size, num_workers) as trainer:
        return without_speed(trainer.evaluate(metric_key_prefix="test"), "test")


@contextmanager
def evaluating_trainer(
    checkpoint: str, model: Any, processor: Any, rows: Any, section: DataSection, batch_size: int, num_workers: int
) -> Iterator[DissectTrainer]:
    """A trainer whose `eval_dataset` are `rows` as pairs, and that leaves no file; see `evaluate_checkpoint`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DissectTrainingArguments(
            folder,
            selection_strategy="none",
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=num_workers,
            image_column=section.image_column or ("image_features" if section.image_features else None),
            caption_column=section.caption_column,
            id_column=section.id_column,
            task_column=section.task_column,
            clean_column=section.clean_column,
            max_bad_fraction=1.0,
            report_to="none",
        )
        pairs = as_pairs(rows, **arguments.column_names())
        number_tasks_as_saved(pairs, checkpoint)
        yield DissectTrainer(model=model, args=arguments, eval_dataset=pairs, processing_class=processor)


def recipe_of(checkpoint: str) -> Recipe | None:
    """The recipe that lies in the folder of a run or of one of its checkpoints, or on the Hub, if there is one."""
    if is_hub_address(checkpoint):
        try:
            return pull_recipe(HubAddress.parse(checkpoint), kind=Recipe)
        except RecipeError as error:
            raise ValueError(f"{error}\nName the data with --data.") from error
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        if (folder / "recipe.yaml").is_file():
            return Recipe.load(folder / "recipe.yaml")
    return None


def data_section(checkpoint: str, data: str | None, recipe: Recipe | None) -> DataSection:
    """What `data` names, see `evaluate_checkpoint`; None for the data of the checkpoint's recipe.

    Raises:
        ValueError: neither data nor a recipe.
    """
    if data is None:
        if recipe is None:
            raise ValueError(f"{checkpoint} has no recipe.yaml to take the data from; name the data with --data.")
        return recipe.data
    if data == "scenes":
        return DataSection(source="scenes", scenes_train=1)
    if data.endswith(".tar"):
        return DataSection(source="webdataset", path=data)
    local = Path(data).expanduser().exists() or data.startswith((".", "/", "~"))
    return DataSection(source="folder" if local else "hub", path=data)


def _has_captions(rows: Any, caption_column: str | None) -> bool:
    return caption_column is not None or any(name in rows.column_names for name in CAPTION_COLUMNS)


def _class_names(rows: Any, label_column: str) -> list[str] | None:
    feature = rows.features.get(label_column)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None
