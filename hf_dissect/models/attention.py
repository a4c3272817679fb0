"""The attention of a model's towers: SDPA, which transformers chooses where it can, or slower code of the model."""

import logging
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def list_attention(model: nn.Module) -> dict[str, str]:
    """Return the implementation of attention of each part of a model that has attention, by the name of the part.

    Args:
        model: Model, wrapped or not.

    Returns:
        Such as `{"vision_model": "sdpa", "text_model": "eager"}`, without the parts of a part.
    """
    return {name: str(part.config._attn_implementation) for name, part in _list_parts(model)}


def warn_of_eager_attention(model: nn.Module) -> None:
    """Warn of each part of a model whose attention keeps all weights in memory, `(pairs, heads, tokens, tokens)`."""
    for name, part in _list_parts(model):
        if part.config._attn_implementation != "eager":
            continue
        way_out = (
            'load it with attn_implementation="sdpa", or leave that out of model.config'
            if part._supports_sdpa
            else "transformers offers no other for it"
        )
        logger.warning(
            "%s (%s) computes attention in eager mode, slower and with more memory than SDPA: %s.",
            name or "The model",
            type(part).__name__,
            way_out,
        )


def _list_parts(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the innermost pretrained models with attention heads, as towers are, by name."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for name, part in parts.items():
        prefix = f"{name}." if name else ""
        if any(other != name and other.startswith(prefix) for other in parts):
            continue
        heads = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads")
        if any(getattr(part.config, head, None) for head in heads):
            yield name, part
