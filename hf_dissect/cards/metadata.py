"""The part of a card that the Hub reads: tags, ids of base model and data, and the evaluation results."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.report.plots import to_finite
from hf_dissect.report.tables import select_final_figures, label, as_mapping

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

TAGS = ("clip", "dissect", "sample-selection", "image-text-retrieval", "hf_dissect")
DATA_NAMES = {
    "scenes": "Drawn scenes of hf_dissect",
    "hub": "Image-text pairs",
    "folder": "Local image-text pairs",
    "imagefolder": "Local image-text pairs",
    "webdataset": "Image-text pairs in tar shards",
}
"""What data are called that have no id on the Hub, by their source in a recipe."""

_RETRIEVAL = re.compile(r"(?!.*noise).*(?:r@\d+|recall_sum|median_rank).*", re.IGNORECASE)
_ZERO_SHOT = re.compile(r"zero_shot_.*")


def card_metadata(
    metrics: Mapping,
    *,
    name: str,
    recipe: "Recipe | None",
    evaluated: str,
    base_model: str | None,
    reads_features: bool,
    told: Mapping,
) -> ModelCardData:
    """The metadata of one run's card.

    Args:
        metrics: the content of the run's `metrics.json`.
        name: of the model.
        recipe: of the run, if it has one.
        evaluated: the split that the final figures are of: "test" or "validation".
        base_model: id of the Hub, None where there is none.
        reads_features: whether the model reads stored features, so that no picture can be shown to it.
        told: `license`, `language`, `tags` and `datasets` as the user gave them.
    """
    adapter = as_mapping(metrics.get("adapter"))
    own = None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)
    results = eval_results(metrics, recipe, evaluated)
    return ModelCardData(
        license=told.get("license"),
        language=told.get("language"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="feature-extraction" if reads_features else "zero-shot-image-classification",
        tags=[*TAGS, *(("peft", adapter["type"]) if adapter else ()), *listed(told.get("tags"))],
        base_model=base_model,
        datasets=list(dict.fromkeys([*([own] if own else []), *listed(told.get("datasets"))])) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def eval_results(metrics: Mapping, recipe: "Recipe | None", evaluated: str) -> list[EvalResult]:
    """Retrieval (recalls in per cent) and zero-shot accuracy (shares of 1) as results of the Hub."""
    retrieval, zero_shot = _retrieval_data(recipe, evaluated), _zero_shot_data(recipe)
    results = []
    for key, value in select_final_figures(metrics).items():
        number = to_finite(value)
        if number is None or not may_be_published(key):
            continue
        if _ZERO_SHOT.fullmatch(key):
            results.append(eval_result("zero-shot-image-classification", zero_shot, key, number))
        elif _RETRIEVAL.fullmatch(key):
            results.append(eval_result("image-text-retrieval", retrieval, key, number))
    return results


def eval_result(task: str, data: Mapping, key: str, value: float) -> EvalResult:
    """The figure `key` as a result of the Hub, on the data that `data_fields` tells."""
    return EvalResult(
        task_type=task,
        task_name=task.replace("-", " ").capitalize(),
        metric_type=" ".join(key.split()),
        metric_name=" ".join(label(key).split()),
        metric_value=value,
        **data,
    )


def _retrieval_data(recipe: "Recipe | None", evaluated: str) -> dict:
    if recipe is None:
        return data_fields(None, None, evaluated)
    data = recipe.data
    return data_fields(data.source, data.path, getattr(data, f"{evaluated}_split"), data.name)


def _zero_shot_data(recipe: "Recipe | None") -> dict:
    section = None if recipe is None else recipe.evaluation.zero_shot
    if section is None:
        return data_fields(None, None, "test")
    return data_fields(section.source if section.path else "scenes", section.path, section.split)


def data_fields(source: str | None, path: str | None, split: str | None, config: str | None = None) -> dict:
    """The fields of `EvalResult` that tell the data; a place on this machine is not among them."""
    name = hub_dataset(source, path)
    split = split if split and may_be_published(split) else None  # of files, it may be told by their names
    return {
        "dataset_type": name or source or "image-text-pairs",
        "dataset_name": name or DATA_NAMES.get(source, "Image-text pairs"),
        "dataset_config": config if name else None,
        "dataset_split": split,
    }


def listed(value: str | list[str] | None) -> list[str]:
    """What a user gave as one text or as several."""
    return [value] if isinstance(value, str) else list(value or [])
