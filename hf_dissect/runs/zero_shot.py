"""Zero-shot classification that a recipe asks for: its images are loaded and its classes checked before training."""

import logging
from typing import Any, cast

from datasets import ClassLabel, Dataset

from hf_dissect.data import make_scene_classes
from hf_dissect.data.images import UnusableImage, decode_image, is_feature_vector
from hf_dissect.evaluation import evaluate_zero_shot
from hf_dissect.evaluation.labelled_images import LabelledImages
from hf_dissect.evaluation.zero_shot_classifier import check_prompts
from hf_dissect.recipe.recipe import DataSection, Recipe, ZeroShotSection
from hf_dissect.runs.saved_model import load_split

logger = logging.getLogger(__name__)

KEY = "evaluation.zero_shot"
_KEYS = {"class_names": "classes", "templates": "templates", "image_column": "image_column"}
_KEYS |= {
    "label_column": "label_column",
    "labels": "classes",
    "dataset": "path",
    "split": "split",
    "data.path": "path",
}
_READING = ("separator", "encoding", "image_root")
_KEYS |= {f"data.{name}": name for name in _READING}
_FIRST_IMAGES = 16
_USUAL_SPLIT = "test"  # without it, data of one split are taken whole


def load_labelled_images(section: ZeroShotSection, recipe: Recipe) -> Dataset:
    """Load the images that a recipe wants to be classified, and check classes, templates, labels and columns.

    Args:
        section: Section of the recipe; without a path, the classes are those of the scenes.
        recipe: Recipe, for the settings of the scenes.

    Raises:
        FileNotFoundError: There are no such data.
        ValueError: Something does not fit; the message names the key of the recipe.
    """
    try:
        check_prompts(section.classes, section.templates)
        if section.path is None:
            rows = make_scene_classes(
                recipe.data.scenes_test, seed=recipe.data.scenes_seed, image_size=recipe.data.scenes_image_size
            )
        else:
            is_usual = section.split == _USUAL_SPLIT
            source = cast(str, section.source)  # a checked recipe with a path has one
            read = {name: getattr(section, name) for name in _READING}
            rows = load_split(DataSection(source=source, path=section.path, **read), section.split, whole=is_usual)
        check_class_names(rows, section.classes, section.label_column)
        images = LabelledImages(rows, section.classes, section.image_column, section.label_column)
        _check_first_images(images)
    except (ValueError, TypeError, FileNotFoundError) as error:
        kind = type(error) if isinstance(error, FileNotFoundError) else ValueError
        raise kind(_name_key(str(error), section)) from error
    return rows


def compute_zero_shot_figures(
    model: Any, processor: Any, section: ZeroShotSection, recipe: Recipe, rows: Dataset | None = None
) -> dict[str, float]:
    """Compute the zero-shot accuracies that a recipe asks for.

    Args:
        model: Dual encoder.
        processor: Processor of the model.
        section: Section of the recipe.
        recipe: Recipe, for the settings of the scenes.
        rows: Labelled images, as from `load_labelled_images`; None to load them.

    Returns:
        Figures of `evaluate_zero_shot` under the names `zero_shot_*`.
    """
    rows = load_labelled_images(section, recipe) if rows is None else rows
    figures = evaluate_zero_shot(
        model, processor, rows, section.classes, section.templates, section.image_column, section.label_column
    )
    return {f"zero_shot_{key}": value for key, value in figures.items()}


def check_class_names(rows: Any, classes: list[str], label_column: str | None) -> None:
    """Check that classes are written as the labels of the data are, where one differs from the other by case only.

    Args:
        rows: Labelled images.
        classes: Names of the classes.
        label_column: Column of the labels.

    Raises:
        ValueError: A class is a label in another case, or stands at the place of another label.
    """
    feature = getattr(rows, "features", {}).get(label_column)
    if isinstance(feature, ClassLabel):
        labels, in_order = list(feature.names), len(feature.names) == len(classes)
    elif feature is not None and getattr(feature, "dtype", None) in ("string", "large_string"):
        labels, in_order = sorted({label for label in rows[label_column] if label is not None}), False
    else:
        return
    if set(labels) <= set(classes):
        return
    as_written = {_fold(label): label for label in labels} | {label: label for label in labels}
    for place, name in enumerate(classes):
        meant = as_written.get(name, as_written.get(_fold(name)))
        if meant is None or (labels[place] == meant if in_order else name == meant):
            continue
        listed = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        fault = f", which the labels in {label_column!r} write {meant!r}"
        if name == meant:
            fault = f" where the labels in {label_column!r} have {labels[place]!r}"
        raise ValueError(f"class_names has {name!r}{fault}; write the classes as the data do: {listed}.")


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _check_first_images(images: LabelledImages) -> None:
    """Raise a ValueError if none of the first images can be read."""
    rows, reason = list(range(min(len(images), _FIRST_IMAGES))), None
    for row, value in zip(rows, images.read_images(rows), strict=True):
        try:
            if not is_feature_vector(value):
                decode_image(value)
        except UnusableImage as error:
            reason = reason or f"row {row}: {error}"
        else:
            return
    raise ValueError(
        f"image_column {images.image_column!r}: none of the first {len(rows)} images can be read; {reason}."
    )


def _name_key(message: str, section: ZeroShotSection) -> str:
    """Return an error message that begins with the key of the recipe to mend."""
    begin = min(
        ((message.find(word), key) for word, key in _KEYS.items() if message.find(word) >= 0), default=(0, "classes")
    )
    if "class_names has" in message:  # of the two that differ, the recipe has the classes
        begin = (0, "classes")
    key = f"{KEY}.{begin[1]}"
    value = getattr(section, begin[1])
    shown = "" if isinstance(value, list) else f" {value!r}"
    words = {"class_names": "classes", "data.path": f"{KEY}.path", "data.source": f"{KEY}.source"}
    words |= {f"data.{name}": f"{KEY}.{name}" for name in _READING}
    for word, name in (words | {"--split": f"{KEY}.split"}).items():
        message = message.replace(word, name)
    return f"{key}{shown}: {message}"
