"""Names the papers of the methods that a run used, so that its card cites these and no others."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dissect.cards.templates import find_template_folder
from hf_dissect.report.tables import as_mapping

_OF_STRATEGY = {
    "dissect": "zhao2025dissect",
    "small_loss": "han2018coteaching",
    "big_loss": "jiang2019selective",
    "clipscore": "hessel2021clipscore",
    "ncr": "huang2021ncr",
    "gsc": "zhao2024gsc",
    "info_batch": "qin2024infobatch",
    "scan": "guo2024scan",
    "divbs": "hong2024divbs",
    "forgetting": "toneva2019forgetting",
    "noisy_channel": "efron2001empirical",
    "learnability": "evans2024jest",
    "jest": "evans2024jest",
    "rho": "mindermann2022rho",
    "coreset": "hessel2021clipscore",
}
_OF_OBJECTIVE = {name: _OF_STRATEGY[name] for name in ("gsc", "noisy_channel")}
_OF_OBJECTIVE |= {"rince": "chuang2022rince", "symnce": "cui2025symnce", "repair": "liu2026in2r"}
_OF_ADAPTER = {"mola": "zhou2024mola", "lora": "hu2022lora"}
_OF_MODEL = {
    "siglip": "zhai2023siglip",
    "siglip2": "tschannen2025siglip2",
    "align": "jia2021align",
    "chinese_clip": "yang2022chineseclip",
}
_OF_DISTILLATION = {
    "amid": "chen2023amid",
    "mi_student_only": "chen2023amid",
    "hinton": "hinton2015distilling",
    "crd": "tian2020crd",
}


def find_papers(metrics: Mapping[str, Any], *, model_type: str | None = None, locked_tower: bool = False) -> list[str]:
    """Return the keys in `citations.bib` of the methods that a run used, each once.

    Args:
        metrics: content of the run's `metrics.json`.
        model_type: type of the dual encoder, None for other models; CLIP is cited for a type without a paper here.
        locked_tower: True if a tower is frozen, or stored features take its place.
    """
    settings = as_mapping(metrics.get("settings"))
    keys = [
        _OF_STRATEGY.get(metrics.get("strategy", "")),
        *(key for name, key in _OF_OBJECTIVE.items() if settings.get(name) is not None),
        _OF_ADAPTER.get(as_mapping(metrics.get("adapter")).get("type", "")),
        "izmailov2018swa" if metrics.get("averaged_weights") else None,
        "gao2021gradcache" if settings.get("grad_cache_chunk_size") else None,
        _OF_DISTILLATION.get(metrics.get("method", "")),
        None if model_type is None else _OF_MODEL.get(model_type, "radford2021clip"),
        "zhai2022lit" if locked_tower else None,
    ]
    return list(dict.fromkeys(key for key in keys if key is not None))


def read_bibtex(keys: Sequence[str]) -> str:
    """Return the entries of `citations.bib` with these keys, in the order of the keys.

    Raises:
        FileNotFoundError: the file is neither in the package nor in the source tree.
        KeyError: the file has no such entry.
    """
    if not keys:
        return ""
    entries = (find_template_folder() / "citations.bib").read_text("utf-8").strip().split("\n\n")
    by_key = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return "\n\n".join(by_key[key] for key in keys)
