"""Model card of a run with sample selection."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dissect.cards.card import choose_title, write_card
from hf_dissect.cards.citations import find_papers
from hf_dissect.cards.metadata import build_metadata, find_pair_results, list_results
from hf_dissect.cards.privacy import hub_dataset
from hf_dissect.cards.rows import list_selection, tabulate_adapter, tabulate_data, tabulate_noise, tabulate_training
from hf_dissect.models.adapters import base_of_adapter, describe_adapter
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig
from hf_dissect.models.loading import bare_model, contrastive_kind, networks_of, text_padding
from hf_dissect.report.picture import PICTURE, draw_run
from hf_dissect.report.tables import as_mapping
from hf_dissect.training.card_callback import CARD, ModelCardCallback

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

__all__ = ["TAGS", "ModelFacts", "write_model_card"]

TAGS = ("clip", "dissect", "sample-selection", "image-text-retrieval", "hf_dissect")

_TEMPLATE = "dissect.md.jinja"
_TITLE = "CLIP trained with hf_dissect"


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that a reader needs to run it.

    Args:
        model_type: type in its configuration; for twins, that of the first network.
        loss: "softmax" or "sigmoid", the function that turns its logits into probabilities.
        padding: "longest" or "max_length", the padding of its captions.
        feature_size: dimension of the stored features that it reads instead of pictures; None for pictures.
        twins: True for a `TwinDualEncoder`.
    """

    model_type: str = "clip"
    loss: str = "softmax"
    padding: str = "longest"
    feature_size: int | None = None
    twins: bool = False


class SelectionCard(ModelCardCallback):
    """Card of a `DissectTrainer`, and the picture that it shows."""

    def write_files(
        self,
        folder: Path,
        state: TrainerState,
        *,
        metrics: Mapping[str, Any],
        evaluated: str,
        progress: str | None,
        given: Mapping[str, Any],
        histogram: dict | None = None,
        **described: Any,
    ) -> None:
        """Write `README.md` and `report.png`; `described` are arguments of `write_model_card`."""
        picture_text = draw_run(folder / PICTURE, state.log_history, histogram)
        card = {
            "metrics": metrics,
            "evaluated": evaluated,
            "progress": progress,
            "told_by_user": given,
            **described,
        }
        picture = {} if picture_text is None else {"picture": PICTURE, "picture_text": picture_text}
        write_model_card(folder / CARD, **card, **picture)
        # PEFT puts a card of its own next to each adapter, which names the folder of the base model.
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / CARD
        if progress is not None and checkpoint.is_file():
            write_model_card(checkpoint, **card)


def tag_model(model: nn.Module) -> None:
    """Add the tags of the package to whatever card is written for the model."""
    if hasattr(bare_model(model), "add_model_tags"):
        bare_model(model).add_model_tags(list(TAGS))


def describe_model(model: nn.Module, recipe: "Recipe | None") -> dict[str, Any]:
    """Return the arguments of `write_model_card` that describe a model, wrapped or not: `model` and `base_model`."""
    return {"model": model_facts(model), "base_model": _base_model(model, recipe)}


def model_facts(model: nn.Module) -> ModelFacts:
    """Return what a reader must know of a model to run it."""
    config = bare_model(model).config
    vision, networks = getattr(config, "vision_config", None), networks_of(model)
    return ModelFacts(
        model_type=networks[0].config.model_type,
        loss=contrastive_kind(model),
        padding=text_padding(model),
        feature_size=vision.hidden_size if isinstance(vision, PrecomputedFeaturesConfig) else None,
        twins=len(networks) > 1,
    )


def _base_model(model: nn.Module, recipe: "Recipe | None") -> str | None:
    """Return what training started from; for an adapter, what it is put on. None for a model that was built here."""
    if describe_adapter(model) is not None:
        return base_of_adapter(model)
    if recipe is not None:
        return recipe.model.name_or_path
    return bare_model(model).name_or_path or None


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
        path: file to write.
        metrics: content of the run's `metrics.json`, as far as it is known.
        base_model: model that the training started from, or the base model of an adapter; None for a model from
            scratch. Only an id of the Hub is named in the card, never the path of a local folder.
        recipe: recipe of the run, if it has one.
        model: facts that are needed to run the model; a CLIP by default.
        model_id: id under which the model can be loaded; None for the folder of the card.
        evaluated: split of the final figures, "test" or "validation".
        progress: how far an unfinished run has come, such as "step 40 of 200".
        picture: name of the picture with the run's curves, in the folder of the card.
        picture_text: description of the picture for readers who cannot see it.
        told_by_user: `license`, `language`, `tags` and `datasets` for the metadata; a card has no license without it.

    Raises:
        FileNotFoundError: the card template is neither in the package nor in the source tree.
    """
    metrics = json.loads(json.dumps(metrics, default=str))  # names instead of enumerations, as in the file
    model = model or ModelFacts()
    adapter = as_mapping(metrics.get("adapter"))
    title = choose_title(recipe, metrics, _TITLE)
    dataset = None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)
    reads_features = model.feature_size is not None
    metadata = build_metadata(
        title,
        dataset=dataset,
        started_from=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="feature-extraction" if reads_features else "zero-shot-image-classification",
        tags=[*TAGS, *(("peft", adapter["type"]) if adapter else ())],
        results=list_results(metrics, find_pair_results(recipe, evaluated)),
        given=told_by_user or {},
    )
    locked = reads_features or (recipe is not None and recipe.model.freeze is not None)
    return write_card(
        path,
        _TEMPLATE,
        title=title,
        metadata=metadata,
        metrics=metrics,
        recipe=recipe,
        started_from=base_model,
        training=[
            *tabulate_adapter(adapter),
            *tabulate_training(metrics, recipe, list_selection(metrics, recipe)),
        ],
        evaluated=evaluated,
        progress=progress,
        model_id=model_id,
        papers=find_papers(metrics, model_type=model.model_type, locked_tower=locked),
        selects=metrics.get("strategy") != "none",
        dataset=dataset,
        data=tabulate_data(metrics, recipe),
        picture=picture,
        picture_text=picture_text,
        noise=tabulate_noise(metrics),
        model=model,
        trusts_code=recipe is not None and recipe.model.trust_remote_code,
        adapter=_describe_adapter(adapter),
    )


def _describe_adapter(adapter: Mapping) -> dict[str, bool] | None:
    """Return the facts that text and snippet of the card need of an adapter; None for a model without one."""
    if not adapter:
        return None
    is_mola = adapter["type"] == "mola"
    variant = as_mapping(adapter.get("settings")).get("variant")
    return {"is_mola": is_mola, "routes_by_task": is_mola and variant == "grad"}
