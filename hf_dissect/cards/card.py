"""The model card of a run of any kind, so that a checkpoint carries its terms of training wherever it is copied to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_dissect.cards.citations import read_bibtex
from hf_dissect.cards.privacy import hub_id, may_be_published
from hf_dissect.cards.rows import Rows, format_rows, tabulate_hyperparameters, tabulate_results
from hf_dissect.cards.templates import render_card
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.report.data import replace_file
from hf_dissect.report.tables import as_mapping


def write_card(
    path: str | os.PathLike,
    template: str,
    *,
    title: str,
    metadata: ModelCardData,
    metrics: Mapping[str, Any],
    recipe: RecipeFile | None,
    started_from: str | None,
    training: Rows,
    evaluated: str,
    progress: str | None,
    model_id: str | None,
    papers: Sequence[str],
    **values: Any,
) -> Path:
    """Fill a template of the folder `model_cards`, write the card to `path`, and return the path.

    Args:
        path: file to write.
        template: file name of a template that extends `card.md.jinja`.
        title: heading of the card, see `choose_title`.
        metadata: the part that the Hub reads, see `build_metadata`.
        metrics: content of the run's `metrics.json`, as far as it is known.
        recipe: recipe of the run, if it has one.
        started_from: model that the training started from; None or empty for a model from scratch. Only an id of the
            Hub is named in the card.
        training: rows of the table of the training.
        evaluated: split of the final figures, "test" or "validation".
        progress: how far an unfinished run has come, such as "step 40 of 200".
        model_id: id under which the model can be loaded; None for the folder of the card.
        papers: keys of the cited papers in `citations.bib`.
        values: everything else that the template shows.

    Raises:
        FileNotFoundError: the card template is neither in the package nor in the source tree.
    """
    card = render_card(
        template,
        title=title,
        metadata=metadata.to_yaml(),
        description=recipe.description if recipe is not None and may_be_published(recipe.description) else "",
        base_model=hub_id(started_from),
        from_scratch=not started_from,
        training=training,
        hyperparameters=tabulate_hyperparameters(metrics),
        evaluated=evaluated,
        progress=progress,
        results=tabulate_results(metrics),
        model_id=model_id or ".",
        versions=format_rows(list(as_mapping(metrics.get("versions")).items())),
        citations=read_bibtex(papers),
        **values,
    )
    return replace_file(path, card)


def choose_title(recipe: RecipeFile | None, metrics: Mapping[str, Any], default: str) -> str:
    """Return the name of the recipe or the run if it may be published, else `default`."""
    names = (None if recipe is None else recipe.name, metrics.get("name"), default)
    return next(" ".join(str(name).split()) for name in names if name and may_be_published(name))
