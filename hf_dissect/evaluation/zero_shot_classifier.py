"""Zero-shot classification with a dual encoder and the names of the classes, measured on a labelled data set."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize

from hf_dissect.data.images import UnusableImage, decode_image, is_feature_vector
from hf_dissect.evaluation.accuracy import rank_classes, summarise_class_ranks
from hf_dissect.evaluation.embeddings import check_positive_integer
from hf_dissect.evaluation.labelled_images import LabelledImages
from hf_dissect.evaluation.passes import show_pass
from hf_dissect.models.families import bare_model, check_dual_encoder, find_max_text_length, find_text_padding
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig, find_feature_size
from hf_dissect.mola import mola_routing
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
    check_prompts(class_names, templates)
    check_positive_integer("batch_size", batch_size)
    if (dim := find_feature_size(model, "text")) is not None:
        raise ValueError(
            f"The model reads stored features of captions ({dim} numbers each) and cannot encode class names; leave "
            "the classes out (--classes, evaluation.zero_shot), or take a model with a text tower."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    sums: Tensor | None = None
    with evaluation_mode(model):
        for start in show_pass(range(0, len(prompts), batch_size), "class names"):
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
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    *,
    task_column: str | None = None,
    task_names: Sequence[str] | None = None,
) -> dict[str, float | int]:
    """Measure the zero-shot accuracy of a model on a labelled data set.

    Args:
        model: Model with `get_image_features` and `get_text_features`, wrapped or not, on any device.
        processor: Processor of the model (image processor and tokenizer); its tokenizer is enough for feature vectors.
        dataset: Rows of images (decoded or not, or the feature vectors that the model reads) and a label column: a
            `ClassLabel`, integers that are positions in `class_names`, or strings out of `class_names`. A `ClassLabel`
            whose names are `class_names` in another order is matched by name, one with other names by position.
        class_names: Distinct names of the classes.
        templates: Prompts with one `{}` each for the name.
        image_column: Name of the image column; None recognises the usual names, as for pairs.
        label_column: Name of the label column; None recognises the usual names, see `LABEL_COLUMNS`.
        batch_size: Number of images embedded at a time.
        task_column: Name of the column of the tasks. A MoLA adapter of variant "grad" embeds an image, and the classes
            that it is compared with, by the expert of its task; None for the mean of the experts.
        task_names: Names of the tasks of the training, by number, if the column holds names; None to number the names
            by the alphabet.

    Returns:
        The metrics of `zero_shot_metrics`, the number `num_images` of images they rest on, and the number
        `num_skipped` of images that could not be decoded.

    Raises:
        TypeError: If `dataset` is not a `datasets.Dataset`.
        ValueError: If the model is not a dual encoder, columns are missing, labels are outside of `class_names`, the
            images are not of the kind that the model reads, it has no expert for a task, or no image can be decoded.
    """
    check_dual_encoder(model)
    model = bare_model(model)
    check_positive_integer("batch_size", batch_size)
    images = LabelledImages(dataset, class_names, image_column, label_column, task_column)
    _check_kind(model, images)
    if task_names is not None:
        images.pairs.number_tasks(task_names)
    ranks, rows_of_ranks, first_error = [], [], None
    for task, rows in _group_by_task(model, images.pairs.task_ids, len(images)):
        with _use_task(model, task):
            class_embeds = class_embeddings(model, processor, class_names, templates)
            embeds, decoded, error = _embed_images(model, processor, images, rows, batch_size)
        first_error = first_error or error
        if embeds is not None:
            ranks.append(rank_classes(embeds, class_embeds, images.labels[decoded]).cpu())
            rows_of_ranks += decoded
    if not ranks:
        raise ValueError(
            f"None of the {len(images)} images in {images.image_column!r} could be decoded; {first_error}."
        )
    labels = torch.from_numpy(images.labels[rows_of_ranks])
    metrics = summarise_class_ranks(torch.cat(ranks), labels, len(class_names))
    return {**metrics, "num_images": len(rows_of_ranks), "num_skipped": len(images) - len(rows_of_ranks)}


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Raise a ValueError unless class names are distinct strings and each template has one `{}`."""
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


def _embed_images(
    model: Any, processor: Any, images: LabelledImages, rows: Sequence[int], batch_size: int
) -> tuple[Tensor | None, list[int], str | None]:
    """Return embeddings of the images that can be read, the rows of those, and the reason of the first that cannot."""
    embeds: list[Tensor] = []
    read: list[int] = []
    first_error, dim = None, _find_feature_dim(model)
    with evaluation_mode(model):
        for start in show_pass(range(0, len(rows), batch_size), "zero-shot images"):
            usable: list[Any] = []
            batch = rows[start : start + batch_size]
            for row, value in zip(batch, images.read_images(batch), strict=True):
                try:
                    usable.append(decode_image(value) if dim is None else _read_vector(value, dim))
                    read.append(row)
                except UnusableImage as error:
                    first_error = first_error or f"row {row}: {error}"
            if usable:
                inputs = _move_to_device(_make_inputs(processor, usable), model)
                embeds.append(_compute_features(model.get_image_features, inputs).float())
    return torch.cat(embeds) if embeds else None, read, first_error


def _find_feature_dim(model: Any) -> int | None:
    """Return the size of the feature vectors that a model reads; None for a model of pictures."""
    tower = getattr(getattr(model, "config", None), "vision_config", None)
    return tower.hidden_size if isinstance(tower, PrecomputedFeaturesConfig) else None


def _check_kind(model: Any, images: LabelledImages) -> None:
    """Raise a ValueError if the first image is of another kind than the model reads; it says which column to name."""
    (first,), dim = images.read_images([0]), _find_feature_dim(model)
    found = len(first) if is_feature_vector(first) else None
    if first is not None and found != dim:
        kinds = ["pictures" if size is None else f"feature vectors of {size} numbers" for size in (found, dim)]
        raise ValueError(
            f"image_column {images.image_column!r} holds {kinds[0]}, but the model ({type(model).__name__}) reads "
            f"{kinds[1]}. Name the right column, or choose the model to fit."
        )


def _read_vector(value: Any, dim: int) -> Tensor:
    if value is None or len(value) != dim:
        raise UnusableImage(f"not a feature vector of {dim} numbers")
    vector = torch.as_tensor(np.asarray(value, dtype=np.float32))
    if not vector.isfinite().all():
        raise UnusableImage("a feature vector with numbers that are not finite")
    return vector


def _make_inputs(processor: Any, images: list[Any]) -> Any:
    if isinstance(images[0], Tensor):
        return {"pixel_values": torch.stack(images)}
    image_processor = getattr(processor, "image_processor", processor)
    return image_processor(images=images, return_tensors="pt")


def _group_by_task(
    model: torch.nn.Module, task_ids: np.ndarray | None, num_rows: int
) -> Iterator[tuple[int | None, list[int]]]:
    """Yield the tasks for which a model has experts of their own, and the rows of each; else None and all rows."""
    routing = mola_routing(model)
    if routing is None or not routing.needs_task_ids or task_ids is None:
        yield None, list(range(num_rows))
        return
    num_experts = min(routing.mola_config[name].num_experts for name in _list_grad_adapters(routing))
    for task in np.unique(task_ids).tolist():
        if not 0 <= task < num_experts:
            raise ValueError(
                f"dataset has task {task}, but the adapter has num_experts={num_experts}, an expert for each of the "
                f"tasks 0 to {num_experts - 1}; number the tasks as in training, or leave task_column out."
            )
        yield task, np.flatnonzero(task_ids == task).tolist()


@contextmanager
def _use_task(model: torch.nn.Module, task: int | None) -> Iterator[None]:
    """Use the experts of a task, for any tower that is called by itself; None for those that the model chooses."""
    routing = mola_routing(model)
    if routing is None or task is None:
        yield
        return
    before = dict(routing.fixed_task)
    routing.fixed_task.update(dict.fromkeys(_list_grad_adapters(routing), task))
    try:
        yield
    finally:
        routing.fixed_task.clear()
        routing.fixed_task.update(before)


def _list_grad_adapters(routing: Any) -> list[str]:
    return [name for name in routing.active_adapters if routing.mola_config[name].variant == "grad"]


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
