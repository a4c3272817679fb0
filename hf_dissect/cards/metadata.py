"""The part of a card that the Hub reads: tags, ids of base model and data, and the evaluation results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from hf_dissect.cards.privacy import hub_dataset, hub_id, may_be_published
from hf_dissect.report.plots import to_finite
from hf_dissect.report.tables import label, select_final_figures

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

DATA_NAMES = {
    "scenes": "Drawn scenes of hf_dissect",
    "hub": "Image-text pairs",
    "folder": "Local image-text pairs",
    "imagefolder": "Local image-text pairs",
    "webdataset": "Image-text pairs in tar shards",
}
"""Names of data without an id on the Hub, by their source in a recipe."""

_RETRIEVAL = r"(?!.*noise).*(?:r@\d+|recall_sum|median_rank).*"
_ZERO_SHOT = r"zero_shot_.*"


@dataclass(frozen=True)
class ResultKind:
    """Figures that are results of one task on one data set.

    Args:
        pattern: matches all of the name of such a figure, case ignored.
        task: task of the Hub, such as "image-classification".
        data: fields of `EvalResult` that name the data, see `describe_data`.
    """

    pattern: str
    task: str
    data: Mapping[str, Any]


def build_metadata(
    name: str,
    *,
    dataset: str | None,
    started_from: str | Sequence[str] | None,
    library_name: str,
    pipeline_tag: str | None,
    tags: Sequence[str],
    results: Sequence[EvalResult],
    given: Mapping[str, Any],
) -> ModelCardData:
    """Build the metadata of the card of a run.

    Args:
        name: name of the model.
        dataset: id on the Hub of the training data, None if they have none.
        started_from: model that the training started from, or its two towers; named if it is an id of the Hub.
        library_name: library that loads the model.
        pipeline_tag: task of the Hub that the model solves.
        tags: tags of the model; those that the user gave are added.
        results: final figures, see `list_results`.
        given: `license`, `language`, `tags` and `datasets` as the user gave them.
    """
    return ModelCardData(
        license=given.get("license"),
        language=given.get("language"),
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        tags=[*tags, *_as_list(given.get("tags"))],
        base_model=_name_bases(started_from),
        datasets=list(dict.fromkeys([*_as_list(dataset), *_as_list(given.get("datasets"))])) or None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def _name_bases(started_from: str | Sequence[str] | None) -> str | list[str] | None:
    if started_from is None or isinstance(started_from, str):
        return hub_id(started_from)
    return [name for name in map(hub_id, started_from) if name is not None] or None


def list_results(metrics: Mapping[str, Any], kinds: Sequence[ResultKind]) -> list[EvalResult]:
    """Return the final figures that one of `kinds` describes as results of the Hub; the first that matches counts."""
    results = []
    for key, value in select_final_figures(metrics).items():
        kind = next((kind for kind in kinds if re.fullmatch(kind.pattern, key, re.IGNORECASE)), None)
        number = to_finite(value)
        if kind is None or number is None or not may_be_published(key):
            continue
        results.append(
            EvalResult(
                task_type=kind.task,
                task_name=kind.task.replace("-", " ").capitalize(),
                metric_type=" ".join(key.split()),
                metric_name=" ".join(label(key).split()),
                metric_value=number,
                **kind.data,
            )
        )
    return results


def find_pair_results(recipe: "Recipe | None", evaluated: str) -> list[ResultKind]:
    """Return the kinds of results of a dual encoder: zero-shot accuracy and retrieval.

    Args:
        recipe: recipe of the run, if it has one.
        evaluated: split of the retrieval figures, "test" or "validation".
    """
    if recipe is None:
        retrieval, zero_shot = describe_data(None, None, evaluated), describe_data(None, None, "test")
    else:
        data, section = recipe.data, recipe.evaluation.zero_shot
        retrieval = describe_data(data.source, data.path, getattr(data, f"{evaluated}_split"), data.name)
        zero_shot = describe_data(None, None, "test")
        if section is not None:
            zero_shot = describe_data(section.source if section.path else "scenes", section.path, section.split)
    return [
        ResultKind(_ZERO_SHOT, "zero-shot-image-classification", zero_shot),
        ResultKind(_RETRIEVAL, "image-text-retrieval", retrieval),
    ]


def describe_data(
    source: str | None,
    path: str | None,
    split: str | None,
    config: str | None = None,
    unnamed: tuple[str, str] | None = None,
) -> dict[str, str | None]:
    """Return the fields of `EvalResult` that name the data; a place on this machine is not among them.

    Args:
        source: source of the data as in a recipe.
        path: path of the data as in a recipe.
        split: evaluated split.
        config: configuration of a data set of the Hub.
        unnamed: type and name of data without an id on the Hub; by default those of image-text pairs.
    """
    name = hub_dataset(source, path)
    kind, words = unnamed or (source or "image-text-pairs", DATA_NAMES.get(source or "", "Image-text pairs"))
    return {
        "dataset_type": name or kind,
        "dataset_name": name or words,
        "dataset_config": config if name else None,
        # The split of files may be the name of a folder.
        "dataset_split": split if split and may_be_published(split) else None,
    }


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
