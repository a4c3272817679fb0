"""Makes a classifier out of a dual encoder and the names of the classes, and measures it on a labelled data set."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value
from torch import Tensor
from torch.nn.functional import normalize

from hf_dissect.data.images import UnusableImage, decode_image
from hf_dissect.evaluation.accuracy import zero_shot_metrics
from hf_dissect.evaluation.embeddings import check_positive_integer
from hf_dissect.models.families import bare_model, check_dual_encoder, max_text_length, text_padding
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
    """Embeds each class as the mean over prompt templates (CLIP, arXiv 2103.00020, section 3.1.4).

    Args:
        model: A model with `get_image_features` and `get_text_features`, wrapped or not, on any device.
        processor: Its processor, or its tokenizer.
        class_names: `num_classes` different names.
        templates: Prompts with one `{}` each, where the name goes, such as `"a photo of a {}."`.
        batch_size: Number of prompts embedded at a time.

    Returns:
        `(num_classes, dim)` float32 of length 1: normalised prompt embeddings, averaged and normalised again.

    Raises:
        ValueError: If the model is no dual encoder, on empty or repeated names, or a template without one `{}`.
    """
    check_dual_encoder(model)
    model = bare_model(model)
    _check_prompts(class_names, templates)
    check_positive_integer("batch_size", batch_size)
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    sums = None
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_size):
            inputs = _text_inputs(model, tokenizer, prompts[start : start + batch_size])
            embeds = normalize(_features(model.get_text_features, inputs).float(), dim=1)
            if sums is None:
                sums = embeds.new_zeros(len(class_names), embeds.shape[1])
            class_of_prompt = torch.arange(start, start + len(embeds), device=embeds.device) // len(templates)
            sums.index_add_(0, class_of_prompt, embeds)
    return normalize(sums, dim=1)


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
    """Zero-shot accuracy of `model` on a labelled data set.

    Args:
        model: As in `class_embeddings`.
        processor: Its processor (image processor and tokenizer).
        dataset: Rows of an `Image` column (decoded or not) and a label column: a `ClassLabel`, integers that are
            positions in `class_names`, or strings out of `class_names`. A `ClassLabel` whose names are `class_names`
            in another order is matched by name, one with other names by position.
        class_names, templates: As in `class_embeddings`.
        image_column, label_column: Names of the columns.
        batch_size: Number of images embedded at a time.

    Returns:
        The figures of `zero_shot_metrics`, `num_images` that they rest on, `num_skipped` that could not be decoded.

    Raises:
        TypeError: If `dataset` is no `datasets.Dataset`.
        ValueError: If the model is no dual encoder, on missing columns, labels outside `class_names`, or when no image
            can be decoded.
    """
    check_dual_encoder(model)
    model = bare_model(model)
    check_positive_integer("batch_size", batch_size)
    dataset = _undecoded(dataset, image_column, label_column)
    labels = _label_positions(dataset, label_column, class_names)
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
                inputs = _on_device(image_processor(images=pictures, return_tensors="pt"), model)
                embeds.append(_features(model.get_image_features, inputs).float())
    if not embeds:
        raise ValueError(f"None of the {len(dataset)} images in {image_column!r} could be decoded; {first_error}.")
    metrics = zero_shot_metrics(torch.cat(embeds), class_embeds, labels[decoded_rows])
    return {**metrics, "num_images": len(decoded_rows), "num_skipped": len(dataset) - len(decoded_rows)}


def _features(method: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`(batch, dim)` features: transformers 5 wraps them in an output object, 4 returns the tensor."""
    accepted = inspect.signature(method).parameters
    features = method(**{name: value for name, value in inputs.items() if name in accepted})
    return features if isinstance(features, Tensor) else features.pooler_output


def _on_device(inputs: Any, model: torch.nn.Module) -> dict[str, Tensor]:
    """Moves a batch to the model's device, and floats to the type of its weights, which may be half precision."""
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _text_inputs(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    inputs = tokenizer(
        texts,
        padding=text_padding(model),
        truncation=True,
        max_length=max_text_length(model, tokenizer),
        return_tensors="pt",
    )
    return _on_device(inputs, model)


def _undecoded(dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    """The two columns, with images as files, so that one broken image does not lose its whole batch."""
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
        raise ValueError("dataset is empty: there is nothing to classify.")
    undecoded = dataset.select_columns([image_column, label_column]).with_format(None)
    return undecoded.cast_column(image_column, Image(decode=False))


def _label_positions(dataset: Dataset, label_column: str, class_names: Sequence[str]) -> np.ndarray:
    """Position in `class_names` of each row's label, `(num_rows,)` int64."""
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
            f"{len(unknown)} labels of {label_column!r} are no classes, first {labels[unknown[0]]!r} in row "
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
            f"class_names repeats {repeated}, but a class that stands twice ties with itself; name it once."
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"templates holds {template!r}, but each needs exactly one {{}}, such as 'a photo of a {{}}.'"
            )
