"""Zero-shot classification with a dual encoder and the names of the classes, measured on a labelled data set."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value
from torch import Tensor
from torch.nn.functional import normalize

from hf_dissect.data.images import UnusableImage, decode_image
from hf_dissect.evaluation.accuracy import zero_shot_metrics
from hf_dissect.evaluation.embeddings import check_positive_integer
from hf_dissect.models.families import bare_model, check_dual_encoder, find_max_text_length, find_text_padding
from hf_dissect.selection.scoring import evaluation_mode


@torch.no_grad()
def class_embeddings(
    model: torch.nn.Module,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Embed each class as the mean over prompt templates (CLIP, arXiv 2103.00020, section 3.1.4).

    Args:
        model: Model with `get_image_features` and `get_text_features`, wrapped or not, on any device.
        processor: Processor of the model, or its tokenizer.
        class_names: Distinct names of the classes.
        templates: Prompts with one `{}` each for the name, such as `"a photo of a {}."`.
        batch_size: Number of prompts embedded at a time.

    Returns:
        Embeddings `(num_classes, dim)`, float32, of length 1: normalised prompt embeddings, averaged and normalised
        again.

    Raises:
        ValueError: If the model is not a dual encoder, names are empty or repeated, or a template does not have one
            `{}`.
    """
    check_dual_encoder(model)
    model = bare_model(model)
    _check_prompts(class_names, templates)
    check_positive_integer("batch_size", batch_size)
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    sums: Tensor | None = None
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_size):
            inputs = _tokenize(model, tokenizer, prompts[start : start + batch_size])
            embeds = normalize(_compute_features(model.get_text_features, inputs).float(), dim=1)
            if sums is None:
                sums = embeds.new_zeros(len(class_names), embeds.shape[1])
            class_of_prompt = torch.arange(start, start + len(embeds), device=embeds.device) // len(templates)
            sums.index_add_(0, class_of_prompt, embeds)
    return normalize(cast(Tensor, sums), dim=1)


@torch.no_grad()
def evaluate_zero_shot(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    class_names: Sequence[str],
    templates: Sequence[str],
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
) -> dict[str, float | int]:
    """Measure the zero-shot accuracy of a model on a labelled data set.

    Args:
        model: Model with `get_image_features` and `get_text_features`, wrapped or not, on any device.
        processor: Processor of the model (image processor and tokenizer).
        dataset: Rows of an `Image` column (decoded or not) and a label column: a `ClassLabel`, integers that are
            positions in `class_names`, or strings out of `class_names`. A `ClassLabel` whose names are `class_names`
            in another order is matched by name, one with other names by position.
        class_names: Distinct names of the classes.
        templates: Prompts with one `{}` each for the name.
        image_column: Name of the image column.
        label_column: Name of the label column.
        batch_size: Number of images embedded at a time.

    Returns:
        The metrics of `zero_shot_metrics`, the number `num_images` of images they rest on, and the number
        `num_skipped` of images that could not be decoded.

    Raises:
        TypeError: If `dataset` is not a `datasets.Dataset`.
        ValueError: If the model is not a dual encoder, columns are missing, labels are outside of `class_names`, or no
            image can be decoded.
    """
    check_dual_encoder(model)
    model = bare_model(model)
    check_positive_integer("batch_size", batch_size)
    dataset = _select_undecoded(dataset, image_column, label_column)
    labels = _find_label_positions(dataset, label_column, class_names)
    class_embeds = class_embeddings(model, processor, class_names, templates)

    image_processor = getattr(processor, "image_processor", processor)
    embeds, decoded_rows, first_error = [], [], None
    with evaluation_mode(model):
        for start in range(0, len(dataset), batch_size):
            pictures = []
            for row, value in enumerate(dataset[start : start + batch_size][image_column], start):
                try:
                    pictures.append(decode_image(value))
                    decoded_rows.append(row)
                except UnusableImage as error:
                    first_error = first_error or f"row {row}: {error}"
            if pictures:
                inputs = _move_to_device(image_processor(images=pictures, return_tensors="pt"), model)
                embeds.append(_compute_features(model.get_image_features, inputs).float())
    if not embeds:
        raise ValueError(f"None of the {len(dataset)} images in {image_column!r} could be decoded; {first_error}.")
    metrics = zero_shot_metrics(torch.cat(embeds), class_embeds, labels[decoded_rows])
    return {**metrics, "num_images": len(decoded_rows), "num_skipped": len(dataset) - len(decoded_rows)}


def _compute_features(method: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the features `(batch, dim)` that a method of the model computes.

    transformers 5 wraps them in an output object, while version 4 returns the tensor.

    Args:
        method: `get_image_features` or `get_text_features`.
        inputs: Inputs by name; those that the method does not take are dropped.
    """
    accepted = inspect.signature(method).parameters
    features = method(**{name: value for name, value in inputs.items() if name in accepted})
    return features if isinstance(features, Tensor) else features.pooler_output


def _move_to_device(inputs: Any, model: torch.nn.Module) -> dict[str, Tensor]:
    """Move a batch to the model's device, and floats to the type of its weights, which may be half precision."""
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _tokenize(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    inputs = tokenizer(
        texts,
        padding=find_text_padding(model),
        truncation=True,
        max_length=find_max_text_length(model, tokenizer),
        return_tensors="pt",
    )
    return _move_to_device(inputs, model)


def _select_undecoded(dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    """Return the two columns, with images as files, so that one broken image does not lose its whole batch."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, but must be a datasets.Dataset: choose one split, "
            "and take(n) rows of a stream into Dataset.from_list."
        )
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            raise ValueError(f"{argument} is {column!r}, but the dataset has {', '.join(dataset.column_names)}.")
    if not isinstance(dataset.features[image_column], Image):
        raise ValueError(
            f"image_column {image_column!r} holds {dataset.features[image_column]}, but must be a datasets.Image "
            "column: dataset.cast_column(name, Image()) makes one of paths or bytes."
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty; give one with at least one row.")
    undecoded = dataset.select_columns([image_column, label_column]).with_format(None)
    return undecoded.cast_column(image_column, Image(decode=False))


def _find_label_positions(dataset: Dataset, label_column: str, class_names: Sequence[str]) -> np.ndarray:
    """Return the position in `class_names` of each row's label, int64 `(num_rows,)`."""
    feature = dataset.features[label_column]
    if not isinstance(feature, (ClassLabel, Value)):
        raise ValueError(f"label_column {label_column!r} holds {feature}, but must hold one label for each image.")
    labels = list(dataset[label_column])
    position = {name: index for index, name in enumerate(class_names)}
    if isinstance(feature, ClassLabel) and len(feature.names) != len(class_names):
        raise ValueError(
            f"label_column {label_column!r} knows {len(feature.names)} classes, but class_names has "
            f"{len(class_names)}: give one name for each, in the order of the labels."
        )
    if isinstance(feature, ClassLabel) and set(feature.names) == set(class_names):
        labels = [feature.names[label] if label is not None and label >= 0 else label for label in labels]
    allowed = position if any(isinstance(label, str) for label in labels) else {i: i for i in position.values()}
    unknown = [row for row, label in enumerate(labels) if label not in allowed]
    if unknown:
        raise ValueError(
            f"{len(unknown)} labels of {label_column!r} are not classes, first {labels[unknown[0]]!r} in row "
            f"{unknown[0]}: a label is one of the {len(class_names)} class_names, or a position among them, 0 to "
            f"{len(class_names) - 1}. Drop unlabelled rows with dataset.filter."
        )
    return np.array([allowed[label] for label in labels], dtype=np.int64)


def _check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    for argument, texts in (("class_names", class_names), ("templates", templates)):
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"{argument} is {texts!r}, but must be a list of at least one string, none of them empty."
            )
    repeated = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if repeated:
        raise ValueError(
            f"class_names repeats {repeated}, but a class that occurs twice ties with itself; name it once."
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"templates holds {template!r}, but each needs exactly one {{}}, such as 'a photo of a {{}}.'"
            )
