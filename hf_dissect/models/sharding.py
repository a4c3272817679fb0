"""Support for FSDP2 and DeepSpeed, which cannot shard a weight without a dimension."""

from typing import Any

from torch import nn


class ShardableScalars:
    """The scalar weights of a model (CLIP's `logit_scale`), with one dimension while the model is sharded.

    FSDP2 refuses a weight without a dimension, and DeepSpeed cannot flatten it. The values stay the same, and saved
    weights have the shape that the model is loaded with.

    Args:
        model: Bare model, not wrapped yet; it is changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: set[str] = set()
        for prefix, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() == 0:
                    self._names.add(f"{prefix}.{name}" if prefix else name)
                    setattr(module, name, nn.Parameter(weight.data.reshape(1), weight.requires_grad))
        _provide_input_embeddings(model)

    def as_saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict with these weights as scalars."""
        return {name: value.reshape(()) if name in self._names else value for name, value in state_dict.items()}


def _provide_input_embeddings(model: Any) -> None:
    """Answer accelerate's question for tied input embeddings, on which a model with two towers raises."""
    try:
        model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        model.get_input_embeddings = lambda: None
