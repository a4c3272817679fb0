"""Evaluation of a saved model, a dual encoder or the student of a distillation, on its own or on other data."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets

from hf_dissect.data import as_pairs
from hf_dissect.data.pair_columns import find_usual_caption_column
from hf_dissect.data.tasks import number_tasks_as_saved
from hf_dissect.distillation.saved_student import is_student
from hf_dissect.evaluation import evaluate_zero_shot
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.recipe.recipe import DataSection
from hf_dissect.runs.evaluate_student import evaluate_student
from hf_dissect.runs.run import compute_zero_shot_figures
from hf_dissect.runs.saved_model import adapt_section, choose_data, fetch_model, load_recipe, load_split
from hf_dissect.trainer import DissectTrainer
from hf_dissect.training.run_folder import drop_speed
from hf_dissect.training_args import DissectTrainingArguments

DEFAULT_TEMPLATES = ("a photo of a {}.",)


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
    max_rows: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
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
        label_column: Column of the labels; None for "label", or the column in the recipe of a student.
        classes: Class names; None for those of the label column, if it has names.
        templates: Captions of a class, with `{}` for its name; None for `DEFAULT_TEMPLATES`.
        image_features: `.npz` file of stored features, for models that read those.
        max_rows: Number of rows to evaluate, from the first; None for all.
        batch_size: Number of pairs or rows in a forward pass.
        num_workers: Number of processes that decode.

    Returns:
        For a dual encoder, retrieval figures if the data have captions, and `zero_shot_*` if they have labels and
        class names. For a student, see `evaluate_student`.

    Raises:
        HubError: The Hub has no such model, or cannot be reached.
        ValueError: There are no data to evaluate on, or an argument does not suit the model.
    """
    if is_student(checkpoint):
        given = {
            "--caption-column": caption_column,
            "--task-column": task_column,
            "--classes": classes,
            "--template": templates,
            "--image-features": image_features,
        }
        if unsuitable := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{checkpoint} is the student of a distillation, which classifies the rows of one column; leave out "
                f"{', '.join(unsuitable)}."
            )
        return evaluate_student(
            checkpoint,
            data=data,
            split=split,
            column=image_column,
            label_column=label_column,
            max_rows=max_rows,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    recipe = load_recipe(checkpoint) if data is None else None
    checkpoint = fetch_model(checkpoint)
    columns = {"image_column": image_column, "caption_column": caption_column, "task_column": task_column}
    section = choose_data(checkpoint, data, recipe)
    section = adapt_section(section, max_rows=max_rows, image_features=image_features, **columns)
    section = dataclasses.replace(section, noise_rate=0.0, noise_permutation=None)
    label_column = label_column or "label"
    rows = load_split(section, split, whole=data is not None)
    model, processor = load_model_and_processor(name_or_path=checkpoint)
    figures: dict[str, float] = {}
    if _has_captions(rows, section.caption_column):
        with make_evaluating_trainer(checkpoint, model, processor, rows, section, batch_size, num_workers) as trainer:
            figures |= drop_speed(trainer.evaluate(metric_key_prefix="test"), "test")
    if names := classes or _find_class_names(rows, label_column):
        shown = templates or DEFAULT_TEMPLATES
        image_column = section.image_column or "image"
        zero_shot = evaluate_zero_shot(model, processor, rows, names, shown, image_column, label_column, batch_size)
        figures |= {f"zero_shot_{key}": value for key, value in zero_shot.items()}
    elif recipe is not None and recipe.evaluation.zero_shot is not None:
        figures |= compute_zero_shot_figures(model, processor, recipe.evaluation.zero_shot, recipe)
    if not figures:
        raise ValueError(
            f"The data have neither captions nor labels with class names (columns: {', '.join(rows.column_names)}); "
            "name them with --caption-column, or --label-column and --classes."
        )
    return figures


@contextmanager
def make_evaluating_trainer(
    checkpoint: str, model: Any, processor: Any, rows: Any, section: DataSection, batch_size: int, num_workers: int
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
    """
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


def _has_captions(rows: Any, caption_column: str | None) -> bool:
    return caption_column is not None or find_usual_caption_column(rows.column_names) is not None


def _find_class_names(rows: Any, label_column: str) -> list[str] | None:
    feature = rows.features.get(label_column)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None
