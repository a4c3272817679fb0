"""What FSDP2 and DeepSpeed need of a dual encoder: no weight without a dimension."""

from torch import nn


class ShardableScalars:
    """The scalar weights of a model (CLIP's `logit_scale`), with a dimension while the model is split over processes.

    FSDP2 refuses a weight without a dimension, and DeepSpeed cannot flatten it. Their values are the same; in what is
    saved they have the shape that the model is loaded with.

    Args:
        model: the bare model, not wrapped yet; it is changed.
    """

    def __init__(self, model: nn.Module):
        self._names: set[str] = set()
        for prefix, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() == 0:
                    self._names.add(f"{prefix}.{name}" if prefix else name)
                    setattr(module, name, nn.Parameter(weight.data.reshape(1), weight.requires_grad))
        _answer_for_input_embeddings(model)

    def as_saved(self, state_dict: dict) -> dict:
        """The state dict with these weights as scalars."""
        return {name: value.reshape(()) if name in self._names else value for name, value in state_dict.items()}


def _answer_for_input_embeddings(model: nn.Module) -> None:
    """accelerate asks for the input embeddings, to tie them; a model with two towers raises instead of answering."""
    try:
        model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        model.get_input_embeddings = lambda: None
