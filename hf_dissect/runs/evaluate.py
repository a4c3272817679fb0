"""Evaluation of a saved model, a dual encoder or the student of a distillation, on its own or on other data."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import datasets

from hf_dissect.data import as_pairs
from hf_dissect.data.arrow_columns import is_list, list_lengths, read_chunked_column
from hf_dissect.data.pair_columns import find_usual_caption_column
from hf_dissect.data.stored_features import FEATURES_COLUMN
from hf_dissect.data.tasks import number_tasks_as_saved, read_task_names
from hf_dissect.distillation.saved_student import is_student
from hf_dissect.evaluation import evaluate_zero_shot
from hf_dissect.evaluation.labelled_images import LabelledImages, find_label_column
from hf_dissect.evaluation.zero_shot_classifier import check_prompts
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.recipe.recipe import DataSection, Recipe
from hf_dissect.runs.data_settings import change_data
from hf_dissect.runs.evaluate_student import evaluate_student
from hf_dissect.runs.run import compute_zero_shot_figures
from hf_dissect.runs.saved_model import (
    adapt_section,
    choose_data,
    fetch_model,
    load_recipe,
    load_split,
    trains_with_mask,
)
from hf_dissect.runs.zero_shot import check_class_names
from hf_dissect.trainer import DissectTrainer
from hf_dissect.training.run_folder import drop_speed
from hf_dissect.training_args import DissectTrainingArguments

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_NOT_SHUFFLED = {
    field.name: "the captions are evaluated as they are"
    for field in dataclasses.fields(DataSection)
    if field.name.startswith("noise_")
}


def evaluate_checkpoint(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    caption_column: str | None = None,
    task_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    image_features: str | None = None,
    text_features: str | None = None,
    data_settings: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    report: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Evaluate a saved model.

    Args:
        checkpoint: Run folder, `checkpoint-N` folder, Hub id, or `hub:USER/REPO` to read the recipe there as well.
        data: "scenes", a local folder or file, tar shards, or the id of a data set on the Hub; for a student also an
            .npz file. None for the data of the recipe next to the model.
        split: Split of the data.
        image_column: Column of the images, or of the modality that a student reads; None for the usual one.
        caption_column: Column of the captions; None for the usual one.
        task_column: Column of the tasks, for an adapter that routes by them; None for that of the recipe, with its own
            data. Without tasks, such an adapter is evaluated as the mean of its experts.
        label_column: Column of the labels; None for the usual one, or the column in the recipe of a student.
        classes: Class names; None for those of the label column, if it has names.
        templates: Captions of a class, with `{}` for its name; None for `DEFAULT_TEMPLATES`.
        image_features: `.npz` file of stored features, for models that read those.
        text_features: `.npz` file of stored features of the captions, for models that read those.
        data_settings: Further settings of the data by name, as in the section `data` of a recipe, such as
            `{"separator": ";", "encoding": "cp1252"}`.
        max_rows: Number of rows to evaluate, from the first; None for all.
        batch_size: Number of pairs or rows in a forward pass.
        num_workers: Number of processes that decode.
        report: Function that is called after each kind of figures with those computed so far, so that a later error
            does not lose them.

    Returns:
        For a dual encoder, retrieval figures if the data have captions, and `zero_shot_*` if they have labels and
        class names. For a student, see `evaluate_student`.

    Raises:
        HubError: The Hub has no such model, or cannot be reached.
        RecipeError: A setting of the data is wrong.
        ValueError: There are no data to evaluate on, or an argument does not suit the model.
    """
    if is_student(checkpoint):
        given = {
            "--caption-column": caption_column,
            "--task-column": task_column,
            "--classes": classes,
            "--template": templates,
            "--image-features": image_features,
            "--text-features": text_features,
        }
        if unsuitable := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{checkpoint} is the student of a distillation, which classifies the rows of one column; leave out "
                f"{', '.join(unsuitable)}."
            )
        figures = evaluate_student(
            checkpoint,
            data=data,
            split=split,
            column=image_column,
            label_column=label_column,
            data_settings=data_settings,
            max_rows=max_rows,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        _report(figures, report)
        return figures
    recipe = load_recipe(checkpoint) if data is None else None
    checkpoint = fetch_model(checkpoint)
    columns = {"image_column": image_column, "caption_column": caption_column, "task_column": task_column}
    columns |= {"image_features": image_features, "text_features": text_features}
    section = choose_data(checkpoint, data, recipe)
    section = change_data(section, data_settings, named=data is not None, options=columns, refused=_NOT_SHUFFLED)
    section = adapt_section(section, max_rows=max_rows, **columns)
    section = dataclasses.replace(section, noise_rate=0.0, noise_kind="random", noise_permutation=None)
    rows = load_split(section, split, whole=data is not None)
    retrieves = _has_captions(rows, section.caption_column)
    names = _choose_class_names(rows, classes, label_column)
    images = None
    if names is not None:
        templates = templates or DEFAULT_TEMPLATES
        images = _prepare_images(rows, names, templates, section, label_column, sampled=max_rows is not None)
    zero_shot = recipe.evaluation.zero_shot if recipe is not None and names is None else None
    if not retrieves and names is None and zero_shot is None:
        raise ValueError(
            f"The data have neither captions nor labels with class names (columns: {', '.join(_list_columns(rows))}); "
            "name them with --caption-column, or --label-column and --classes."
        )

    model, processor = load_model_and_processor(name_or_path=checkpoint)
    masks = trains_with_mask(checkpoint) if recipe is None else recipe.selection.mask_false_negatives
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "mask_false_negatives": masks}
    figures = {}
    if retrieves:
        with make_evaluating_trainer(checkpoint, model, processor, rows, section, **options) as trainer:
            figures |= drop_speed(trainer.evaluate(metric_key_prefix="test"), "test")
        _report(figures, report)
    if images is not None:
        classified = evaluate_zero_shot(
            model,
            processor,
            images,
            cast(Sequence[str], names),
            cast(Sequence[str], templates),
            _find_image_column(section),
            label_column,
            batch_size,
            task_column=section.task_column,
            task_names=read_task_names(checkpoint),
        )
        figures |= {f"zero_shot_{key}": value for key, value in classified.items()}
        _report(figures, report)
    elif zero_shot is not None:
        figures |= compute_zero_shot_figures(model, processor, zero_shot, cast(Recipe, recipe))
        _report(figures, report)
    return figures


@contextmanager
def make_evaluating_trainer(
    checkpoint: str,
    model: Any,
    processor: Any,
    rows: Any,
    section: DataSection,
    batch_size: int,
    num_workers: int,
    mask_false_negatives: bool = False,
) -> Iterator[DissectTrainer]:
    """Yield a trainer that evaluates a dual encoder on `rows` and writes no files.

    Args:
        checkpoint: Folder or Hub id of the model, for the numbers of the tasks if its adapter has any.
        model: Dual encoder.
        processor: Processor of the model.
        rows: Table of the pairs, which becomes the `eval_dataset` of the trainer.
        section: Data section with the names of the columns.
        batch_size: Number of pairs in a forward pass.
        num_workers: Number of processes that decode.
        mask_false_negatives: True to leave pairs that share an image or a caption out of each other's negatives in the
            loss, as in training.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = DissectTrainingArguments(
            folder,
            selection_strategy="none",
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=num_workers,
            mask_false_negatives=mask_false_negatives,
            image_column=_find_image_column(section),
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


def _report(figures: dict[str, float], report: Callable[[dict[str, float]], None] | None) -> None:
    if report is not None:
        report(dict(figures))


def _find_image_column(section: DataSection) -> str | None:
    return section.image_column or (FEATURES_COLUMN if section.image_features else None)


def _list_columns(rows: Any) -> list[str]:
    return rows.column_names or list(next(iter(rows), {}))  # a stream may know its columns from its rows only


def _has_captions(rows: Any, caption_column: str | None) -> bool:
    if caption_column is not None:
        return True
    name = find_usual_caption_column(_list_columns(rows))
    if name is None or not isinstance(rows, datasets.Dataset):
        return name is not None
    captions = read_chunked_column(rows, name)
    if is_list(captions.type):
        return bool((list_lengths(captions) > 0).any())
    return captions.null_count < len(captions)  # shards of labelled images have an empty column


def _choose_class_names(rows: Any, classes: Sequence[str] | None, label_column: str | None) -> list[str] | None:
    """Return the names of the classes, given or those of the label column; None for data without labelled images."""
    if classes:
        return list(classes)
    column = find_label_column(_list_columns(rows), label_column)
    feature = None if rows.features is None or column is None else rows.features.get(column)
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if label_column is not None:
        fault = "is not a column" if feature is None else "does not name its classes"
        raise ValueError(
            f"--label-column {label_column!r} {fault}; the data have {', '.join(_list_columns(rows))}. Name the "
            "column of the labels, and the classes with --classes."
        )
    return None


def _prepare_images(
    rows: Any,
    names: Sequence[str],
    templates: Sequence[str],
    section: DataSection,
    label_column: str | None,
    sampled: bool,
) -> datasets.Dataset:
    """Return the labelled images as a table, checked before the model is loaded.

    Raises:
        ValueError: The rows are a whole stream, their columns cannot be used, or labels or templates are wrong.
    """
    check_prompts(names, templates)
    if isinstance(rows, datasets.IterableDataset):
        if not sampled:
            raise ValueError(
                "The labelled images are a stream (data.streaming), of which a number of rows can be classified; name "
                "it with --max-rows, or name files of this machine with --data."
            )
        rows = datasets.Dataset.from_list(list(rows), features=rows.features)
    check_class_names(rows, list(names), find_label_column(rows.column_names, label_column))
    LabelledImages(rows, names, _find_image_column(section), label_column, section.task_column)
    return rows
