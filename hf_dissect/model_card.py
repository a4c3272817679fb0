"""Model card of a run, so that a checkpoint says on what terms it was trained wherever it is copied to."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dissect.cards.citations import bibtex, cited_papers
from hf_dissect.cards.metadata import TAGS, card_metadata
from hf_dissect.cards.privacy import hub_dataset, hub_id, may_be_published
from hf_dissect.cards.rows import (
    adapter_rows,
    data_rows,
    hyperparameter_rows,
    noise_rows,
    result_rows,
    told,
    training_rows,
)
from hf_dissect.cards.templates import render_card, template_folder
from hf_dissect.report.data import replace_file
from hf_dissect.report.tables import as_mapping

if TYPE_CHECKING:
    from hf_dissect.recipe.file import RecipeFile
    from hf_dissect.recipe.recipe import Recipe

__all__ = ["TAGS", "ModelFacts", "card_description", "card_title", "write_model_card"]

_TEMPLATE = "dissect.md.jinja"
_TITLE = "CLIP trained with hf_dissect"


@dataclass(frozen=True)
class ModelFacts:
    """What a reader must know of a model to run it.

    Args:
        model_type: of its configuration; of twins, of that of the first.
        loss: "softmax" or "sigmoid": what makes probabilities of its logits.
        padding: "longest" or "max_length": how its captions are padded.
        feature_size: dimension of the stored features that it reads instead of pictures; None for pictures.
        twins: whether it is a `TwinDualEncoder`.
    """

    model_type: str = "clip"
    loss: str = "softmax"
    padding: str = "longest"
    feature_size: int | None = None
    twins: bool = False


def write_model_card(
    path: str | os.PathLike,
    *,
    metrics: Mapping,
    base_model: str | None = None,
    recipe: "Recipe | None" = None,
    model: ModelFacts | None = None,
    model_id: str | None = None,
    evaluated: str = "test",
    progress: str | None = None,
    picture: str | None = None,
    picture_text: str = "",
    told_by_user: Mapping | None = None,
) -> Path:
    """Write the card of one run to `path` (its `README.md`), and return the path.

    Args:
        path: the file to write.
        metrics: the content of the run's `metrics.json`, as far as it is known.
        base_model: what training started from, None for a model from scratch. Only an id of the Hub is named in the
            card: the path of a local folder would tell a reader nothing, and others too much. Of an adapter it is the
            base model that it is put on.
        recipe: of the run, if it has one.
        model: how the model is run; a CLIP by default.
        model_id: id under which the model can be loaded; by default the folder of the card is meant.
        evaluated: the split that the final figures are of, "test" or "validation".
        progress: how far a run has come that is not finished, such as "step 40 of 200".
        picture: name of the picture with the run's curves, in the folder of the card.
        picture_text: what it shows, for readers who cannot see it.
        told_by_user: `license`, `language`, `tags` and `datasets` for the metadata. No license is told otherwise.

    Raises:
        FileNotFoundError: the card template is neither in the package nor in the source tree.
    """
    metrics = json.loads(json.dumps(metrics, default=str))  # names instead of enumerations, as in the file
    model = model or ModelFacts()
    adapter = as_mapping(metrics.get("adapter"))
    base_id = hub_id(base_model)
    title = card_title(recipe, metrics)
    metadata = card_metadata(
        metrics,
        name=title,
        recipe=recipe,
        evaluated=evaluated,
        base_model=base_id,
        reads_features=model.feature_size is not None,
        told=told_by_user or {},
    )
    locked = model.feature_size is not None or (recipe is not None and recipe.model.freeze is not None)
    papers = cited_papers(metrics, model_type=model.model_type, locked_tower=locked)
    card = render_card(
        _TEMPLATE,
        metadata=metadata.to_yaml(),
        title=title,
        description=card_description(recipe),
        progress=progress,
        selects=metrics.get("strategy") != "none",
        base_model=base_id,
        from_scratch=base_model is None,
        dataset=None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path),
        data=data_rows(metrics, recipe),
        training=[*adapter_rows(adapter), *training_rows(metrics, recipe)],
        hyperparameters=hyperparameter_rows(metrics),
        picture=picture,
        picture_text=picture_text,
        evaluated=evaluated,
        results=result_rows(metrics),
        noise=noise_rows(metrics),
        versions=told(list(as_mapping(metrics.get("versions")).items())),
        model_id=model_id or ".",
        model=model,
        trusts_code=recipe is not None and recipe.model.trust_remote_code,
        adapter=_adapter(adapter),
        citations=bibtex(papers, template_folder() / "citations.bib"),
    )
    return replace_file(path, card)


def card_title(recipe: "RecipeFile | None", metrics: Mapping, default: str = _TITLE) -> str:
    """The name of recipe or run, if it may be published."""
    names = (None if recipe is None else recipe.name, metrics.get("name"), default)
    return next(" ".join(str(name).split()) for name in names if name and may_be_published(name))


def card_description(recipe: "RecipeFile | None") -> str:
    """The description in a recipe, if it may be published."""
    return recipe.description if recipe is not None and may_be_published(recipe.description) else ""


def _adapter(adapter: Mapping) -> dict | None:
    """What the card's text and snippet need to know of the adapter; None where the model has none."""
    if not adapter:
        return None
    is_mola = adapter["type"] == "mola"
    variant = as_mapping(adapter.get("settings")).get("variant")
    return {"is_mola": is_mola, "routes_by_task": is_mola and variant == "grad"}
