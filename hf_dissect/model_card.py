"""Model card of a run with online selection."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dissect.cards.card import choose_title, write_card
from hf_dissect.cards.citations import find_papers
from hf_dissect.cards.metadata import build_metadata, find_pair_results, list_results
from hf_dissect.cards.privacy import hub_dataset, hub_id
from hf_dissect.cards.rows import list_selection, tabulate_adapter, tabulate_data, tabulate_noise, tabulate_training
from hf_dissect.models.adapters import describe_adapter, find_base
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.loading import bare_model, find_loss_kind, find_text_padding, list_networks
from hf_dissect.report.picture import PICTURE, draw_run
from hf_dissect.report.tables import as_mapping
from hf_dissect.training.card_callback import CARD, ModelCardCallback

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

__all__ = ["TAGS", "ModelFacts", "write_model_card"]

TAGS = ("clip", "dissect", "sample-selection", "image-text-retrieval", "hf_dissect")

_TEMPLATE = "dissect.md.jinja"
STORED_FEATURES = "stored features"
"""Words in the place of a tower's name if the run read stored features."""
_TITLE = "CLIP trained with hf_dissect"


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that its users need to run it.

    Args:
        model_type: Type in the configuration of the model, or of the first network of twins.
        loss: Function that turns logits into probabilities, "softmax" or "sigmoid".
        padding: Padding of captions, "longest" or "max_length".
        feature_size: Dimension of the stored features that the model reads in place of pictures; None for pictures.
        text_feature_size: Dimension of the stored features that it reads in place of captions; None for captions.
        twins: True for a `TwinDualEncoder`.
    """

    model_type: str = "clip"
    loss: str = "softmax"
    padding: str = "longest"
    feature_size: int | None = None
    text_feature_size: int | None = None
    twins: bool = False


class SelectionCard(ModelCardCallback):
    """Callback that writes the card of a `DissectTrainer`, and its picture."""

    def write_files(self, folder: Path, state: TrainerState, content: dict[str, Any]) -> None:
        """Write `README.md` and `report.png`.

        Args:
            folder: Run folder.
            state: State of the Trainer, with the logs.
            content: Arguments of `write_model_card`, and `histogram`, that of the scores in the last epoch.
        """
        card = {name: value for name, value in content.items() if name != "histogram"}
        picture_text = draw_run(folder / PICTURE, state.log_history, content["histogram"])
        picture = {} if picture_text is None else {"picture": PICTURE, "picture_text": picture_text}
        write_model_card(folder / CARD, **card | picture)
        # PEFT writes a card next to each adapter that names the local folder of the base model.
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / CARD
        if card["progress"] is not None and checkpoint.is_file():
            write_model_card(checkpoint, **card)


def tag_model(model: nn.Module) -> None:
    """Add the tags of the package to a model, so that every card of the model has them."""
    bare: Any = bare_model(model)
    if hasattr(bare, "add_model_tags"):
        bare.add_model_tags(list(TAGS))


def describe_model(model: nn.Module, recipe: "Recipe | None") -> dict[str, Any]:
    """Return the arguments `model` and `base_model` of `write_model_card` for a model, wrapped or not.

    Args:
        model: Model of the run.
        recipe: Recipe of the run; None without one.
    """
    return {"model": find_model_facts(model), "base_model": _find_base_model(model, recipe)}


def find_model_facts(model: nn.Module) -> ModelFacts:
    """Return the facts that users of a model, wrapped or not, need to run it."""
    networks = list_networks(model)
    first: Any = networks[0].config
    return ModelFacts(
        model_type=first.model_type,
        loss=find_loss_kind(model),
        padding=find_text_padding(model),
        feature_size=find_feature_size(model, "vision"),
        text_feature_size=find_feature_size(model, "text"),
        twins=len(networks) > 1,
    )


def _find_base_model(model: nn.Module, recipe: "Recipe | None") -> str | list[str] | None:
    """Return the model or the towers that training started from, or the base of an adapter; None from scratch."""
    if recipe is not None and recipe.model.vision is not None and recipe.model.text is not None:
        vision, text = recipe.model.vision, recipe.model.text
        image_tower = f"timm/{vision.timm.removeprefix('timm/')}" if vision.timm else vision.name_or_path
        return [image_tower or STORED_FEATURES, text.name_or_path or STORED_FEATURES]
    if describe_adapter(model) is not None:
        return find_base(model)
    if recipe is not None:
        return recipe.model.name_or_path
    bare: Any = bare_model(model)
    return bare.name_or_path or None


def write_model_card(
    path: str | os.PathLike,
    *,
    metrics: Mapping,
    base_model: str | Sequence[str] | None = None,
    recipe: "Recipe | None" = None,
    model: ModelFacts | None = None,
    model_id: str | None = None,
    evaluated: str = "test",
    progress: str | None = None,
    picture: str | None = None,
    picture_text: str = "",
    given: Mapping | None = None,
) -> Path:
    """Write the model card of a run.

    Args:
        path: File to write, the `README.md` of the run.
        metrics: Content of `metrics.json` so far.
        base_model: Model that training started from, its vision and its text tower, or the base model of an adapter;
            None for a model from scratch. The card names ids of the Hub, but never the path of a local folder.
        recipe: Recipe of the run; None without one.
        model: Facts about the model; None for those of a CLIP.
        model_id: Id that the model can be loaded by; None for the folder of the card.
        evaluated: Split of the final figures, "test" or "validation".
        progress: Progress of an unfinished run, such as "step 40 of 200"; None for a finished one.
        picture: Name of the picture with the curves of the run, in the folder of the card; None without a picture.
        picture_text: Description of the picture for readers who cannot see it.
        given: `license`, `language`, `tags` and `datasets` for the metadata. Without it, the card names no license.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The template of the card is neither in the package nor in the source tree.
    """
    metrics = json.loads(json.dumps(metrics, default=str))  # as in the file: the names of enumerations
    model = model or ModelFacts()
    adapter = as_mapping(metrics.get("adapter"))
    towers = [] if base_model is None or isinstance(base_model, str) else list(map(_describe_tower, base_model))
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
        given=given or {},
    )
    locked = reads_features or (recipe is not None and recipe.model.freeze is not None)
    return write_card(
        path,
        _TEMPLATE,
        title=title,
        metadata=metadata,
        metrics=metrics,
        recipe=recipe,
        started_from=base_model if isinstance(base_model, str) else None,
        towers=towers,
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


def _describe_tower(name: str) -> str:
    if name == STORED_FEATURES:
        return name
    shown = hub_id(name)
    return f"[`{shown}`](https://huggingface.co/{shown})" if shown else "a local model"


def _describe_adapter(adapter: Mapping) -> dict[str, bool] | None:
    """Return the facts about an adapter for the text and the code of the card; None for a model without one."""
    if not adapter:
        return None
    is_mola = adapter["type"] == "mola"
    variant = as_mapping(adapter.get("settings")).get("variant")
    return {"is_mola": is_mola, "routes_by_task": is_mola and variant == "grad"}
