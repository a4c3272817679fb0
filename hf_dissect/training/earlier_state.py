"""Conversion of state files of earlier versions to the current format."""

from collections.abc import Mapping
from typing import Any

import torch

FORMAT = 2
"""Number of the current format."""


def upgrade(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Convert the state of a selection or a distillation from version 0.1 to the current format.

    Args:
        state: Content of the JSON file, which had no number of a format.
        tensors: Content of the file of tensors, by name.

    Returns:
        State in the current format, with tensors in place.
    """
    parts: dict[str, Any] = {"times": state["times"]}
    if "watch" in state:
        parts["watch"] = state["watch"]
        for name in ("adversary", "bank"):
            prefix = f"{name}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                parts["banks" if name == "bank" else name] = found
    if "monitor" in state:
        parts["selection"] = {
            "epoch": state["epoch"],
            "updated_epoch": state.get("updated_epoch", state["epoch"]),
            "monitor": {**state["monitor"], **tensors},
        }
    ranks = []
    for rank in state["ranks"]:
        own = dict(rank)
        loss, step = own.pop("loss_since_log")
        own["loss_since_log"] = {"loss": loss, "step": step}
        if "decorrelation_since_log" in own:
            own["decorrelation"] = {"since_log": own.pop("decorrelation_since_log")}
        ranks.append(own)
    return {"candidates_per_update": state["candidates_per_update"], "parts": parts, "ranks": ranks}
