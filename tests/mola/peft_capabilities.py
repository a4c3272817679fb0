"""Runs PEFT's `scripts/generate_method_capabilities.py` with MoLA among its methods, and prints the table of the docs.

`make peft-capabilities` runs it. PEFT checks a method by its default settings, so each variant is a method here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_suite import MolaGradConfig

from hf_dissect.mola import MolaConfig, MolaModel


class MolaTypes(str, Enum):  # noqa: UP042
    """The variants of MoLA, as methods."""

    GRAD = "MOLA_GRAD"
    ROUTER = "MOLA_ROUTER"


COLUMNS = {
    **{"MOLA_GRAD": "MoLA, `grad`", "MOLA_ROUTER": "MoLA, `router`"},
    **{"LORA": "LoRA", "POLY": "Poly", "XLORA": "X-LoRA", "LILY": "Lily"},
}
LEFT_OUT = ("category", "paper_url")


def load_script(path: Path) -> types.ModuleType:
    """Import PEFT's script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script  # where its dataclasses look for it
    spec.loader.exec_module(script)
    return script


def check(script: types.ModuleType) -> dict[str, Any]:
    """Return what the script writes, by the name of the method."""
    for kind, config in ((MolaTypes.GRAD, MolaGradConfig), (MolaTypes.ROUTER, MolaConfig)):
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = MolaModel
    kinds = [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value in COLUMNS]
    methods = [script.MethodInfo.from_peft_type(kind) for kind in kinds]
    return script.run_tasks(script.collect_tasks(methods, script.ProbeContext()))


def describe(finding: dict[str, Any]) -> str:
    """Write a finding as a cell of the table."""
    value, note = finding["value"], finding.get("note", "")
    if value is True and "probing failed" in note:
        return "refused"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [name for name, supported in value.items() if supported]
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def write_table(found: dict[str, Any]) -> str:
    """Return the table in Markdown, a row for each feature."""
    rows = [["", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    for feature in found["LORA"]["features"]:
        if feature not in LEFT_OUT:
            cells = [describe(found[name]["features"][feature]) for name in COLUMNS]
            rows.append([feature.replace("_", " "), *cells])
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


if __name__ == "__main__":
    found = check(load_script(Path(sys.argv[1])))
    for name, entry in found.items():
        for feature, finding in entry["features"].items():
            if "note" in finding:
                print(f"{name}, {feature}: {finding['note']}", file=sys.stderr)
    print(write_table(found))
