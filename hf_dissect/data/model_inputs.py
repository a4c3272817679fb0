"""Arguments of a model's forward, taken from a candidate batch."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_dissect.data.pairs import PAIR_KEYS
from hf_dissect.mola import mola_routing

_NOT_FOR_THE_MODEL = frozenset({*PAIR_KEYS, "pair_weight", "reweigh"})


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of the model's forward from a batch of candidates or from its kept part.

    Args:
        model: Model to call, with or without an adapter.
        batch: Output of `SelectionCollator`, optionally with `pair_weight`.

    Returns:
        The arguments, with `task_ids` where an adapter of the model routes by task and the batch has `task_id`.
    """
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
    routing = mola_routing(model) if "task_id" in batch else None
    if routing is not None and routing.needs_task_ids:
        inputs["task_ids"] = batch["task_id"]
    return inputs
