"""Names the papers of the methods that a run used, so that its card cites these and no others."""

import re
from collections.abc import Mapping
from pathlib import Path

from hf_dissect.report.tables import as_mapping

_OF_STRATEGY = {
    "dissect": "zhao2025dissect",
    "small_loss": "han2018coteaching",
    "big_loss": "jiang2019selective",
    "clipscore": "hessel2021clipscore",
    "ncr": "huang2021ncr",
    "gsc": "zhao2024gsc",
}
_OF_ADAPTER = {"mola": "zhou2024mola", "lora": "hu2022lora"}
_OF_MODEL = {
    "siglip": "zhai2023siglip",
    "siglip2": "tschannen2025siglip2",
    "align": "jia2021align",
    "chinese_clip": "yang2022chineseclip",
}


def cited_papers(metrics: Mapping, *, model_type: str, locked_tower: bool) -> list[str]:
    """Keys in `citations.bib` of what a run used, each once.

    Args:
        metrics: the content of the run's `metrics.json`.
        model_type: of the dual encoder; CLIP is cited where the model has no paper of its own here.
        locked_tower: whether a tower is frozen, or stored features stand for it.
    """
    settings = as_mapping(metrics.get("settings"))
    keys = [
        _OF_STRATEGY.get(metrics.get("strategy")),
        _OF_STRATEGY["gsc"] if settings.get("gsc") is not None else None,
        _OF_ADAPTER.get(as_mapping(metrics.get("adapter")).get("type")),
        "gao2021gradcache" if settings.get("grad_cache_chunk_size") else None,
        _OF_MODEL.get(model_type, "radford2021clip"),
        "zhai2022lit" if locked_tower else None,
    ]
    return list(dict.fromkeys(key for key in keys if key is not None))


def bibtex(keys: list[str], file: Path) -> str:
    """The entries of `file` that `keys` name, in this order.

    Raises:
        KeyError: the file has no such entry.
    """
    entries = {re.match(r"@\w+\{(\w+),", entry)[1]: entry for entry in file.read_text("utf-8").strip().split("\n\n")}
    return "\n\n".join(entries[key] for key in keys)
