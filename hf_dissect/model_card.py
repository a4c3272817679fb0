"""Model card of a run, so that a checkpoint says on what terms it was trained wherever it is copied to."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_dissect.report_data import replace_file
from hf_dissect.report_tables import final_figures, format_number, mapping, results_table, run_figures

TAGS = ("clip", "dissect", "sample-selection", "image-text-retrieval", "hf_dissect")
_TEMPLATE = "dissect.md.jinja"
# Installed inside the package; in a source tree at its top level.
_FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parent.parent / "model_cards")


SELECTION_SETTINGS = {"selection_ratio", "selection_warmup_epochs", "selection_options", "mask_false_negatives"}
"""Settings of a run that a card may show: none of them can hold a path."""


def write_model_card(
    path: str | os.PathLike,
    *,
    metrics: Mapping,
    base_model: str | None = None,
    recipe_name: str | None = None,
    model_id: str | None = None,
) -> Path:
    """Write the card of one run to `path` (its `README.md`), and return the path.

    Args:
        path: the file to write.
        metrics: the content of the run's `metrics.json`.
        base_model: what training started from, None for a model from scratch. Only an id of the Hub is named in the
            card: the path of a local folder would tell a reader nothing, and others too much. Of an adapter it is the
            base model that it is put on.
        recipe_name: name of the recipe, if one was used.
        model_id: id under which the model can be loaded; by default the folder of `path` is meant.

    Raises:
        FileNotFoundError: the card template is neither in the package nor in the source tree.
    """
    folder = next((folder for folder in _FOLDERS if (folder / _TEMPLATE).is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"No {_TEMPLATE} in any of {[str(f) for f in _FOLDERS]}. Install hf_dissect again.")
    adapter = mapping(metrics.get("adapter"))
    hub_id = base_model if base_model is not None and _is_hub_id(base_model) else None
    metadata = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": [*TAGS, *(("peft", adapter["type"]) if adapter else ())],
        **({"base_model": hub_id} if hub_id else {}),
    }
    table = results_table([("", final_figures(metrics))], corner="")
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["inline"] = _inline
    card = environment.get_template(_TEMPLATE).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        title=recipe_name or metrics.get("name") or "CLIP trained with hf_dissect",
        selects=metrics.get("strategy") != "none",
        base_model=hub_id,
        from_scratch=base_model is None,
        training=_training(metrics, recipe_name),
        results=[(name, cell.text + cell.spread) for name, cell in zip(table.columns, table.rows[0], strict=True)],
        model_id=model_id or ".",
        adapter=_adapter(adapter),
    )
    return replace_file(path, card)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _training(metrics: Mapping, recipe_name: str | None) -> list[tuple[str, str]]:
    """Rows of the training table; what the run did not record is left out."""
    settings = {"strategy": metrics.get("strategy")}
    for key, value in mapping(metrics.get("settings")).items():
        if key in SELECTION_SETTINGS:
            settings[key.removeprefix("selection_")] = value
    times, figures = mapping(metrics.get("times")), run_figures(metrics)
    rows = [
        ("Recipe", recipe_name),
        *((f"Selection: {key}", value) for key, value in settings.items()),
        ("Training pairs", metrics.get("num_pairs")),
        ("Optimiser steps", metrics.get("steps")),
        ("Seed", metrics.get("seed")),
        ("Mismatched pairs among kept", _known("noise_kept", figures["noise_kept"])),
        ("Wall-clock", _known("total_s", times.get("total_s"))),
        ("Time for scoring", _known("scoring_share", figures["scoring_share"])),
    ]
    return [(k, v if isinstance(v, str) else json.dumps(v, default=str)) for k, v in rows if v not in (None, {}, [])]


def _adapter(adapter: Mapping) -> dict | None:
    """What the card says of the adapter; None where the model has none."""
    if not adapter:
        return None
    settings = mapping(adapter.get("settings"))
    is_mola = adapter["type"] == "mola"
    rows = [
        ("Adapter", "MoLA, mixture of low-rank adapters" if is_mola else adapter["type"]),
        *(
            (f"Adapter: {key}", value if isinstance(value, str) else json.dumps(value))
            for key, value in settings.items()
        ),
        ("Trained parameters", f"{adapter.get('trained_parameters', 0):,}"),
    ]
    return {"is_mola": is_mola, "routes_by_task": settings.get("variant") == "grad" and is_mola, "rows": rows}


def _known(key: str, value: object) -> str | None:
    return None if value is None else format_number(value, key)


def _inline(text: object) -> str:
    """`text` on one line, without what Markdown or HTML would take for a table cell's end, a tag or a link."""
    line = " ".join(str(text).split())
    return re.sub(r"[|<>\[\]`\\]", lambda match: f"&#{ord(match[0])};", line)
