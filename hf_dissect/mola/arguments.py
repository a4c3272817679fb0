"""The arguments of a call: where its samples and its prompts are, and what a router may see of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_SAMPLES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values")


def find_samples(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the argument that has a row for each sample; None without a tensor.

    Args:
        given: Arguments of the call, by name.
    """
    names = (*_SAMPLES, *(name for name in given if name != "task_ids"))
    return next((given[name] for name in names if torch.is_tensor(given.get(name))), None)


def count_cached(cache: Any) -> int:
    """Return the number of tokens in a cache of transformers.

    Args:
        cache: Argument `past_key_values`.
    """
    count = getattr(cache, "get_seq_length", None)
    return int(count()) if count is not None else len(cache)


def find_prompts(given: Mapping[str, Any], whole: bool) -> torch.Tensor | None:
    """Return the tokens of a language model's call that a router may see.

    Args:
        given: Arguments of the call, by name.
        whole: True if all tokens are the prompt, as in the first step of a generation.

    Returns:
        Bool `(B, L)`; None without tokens.
    """
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    mask = read_mask(given.get("attention_mask"))
    if tokens is None:
        return mask
    mask = mask if mask is not None and mask.shape == tokens.shape[:2] else None
    return find_prompt(tokens, given.get("labels"), mask, whole)


def hide_what_is_predicted(given: Mapping[str, Any], prompts: torch.Tensor | None) -> dict[str, Any]:
    """Return the arguments of a language model's call as a router may see them.

    Args:
        given: Arguments of the call, by name.
        prompts: Tokens that it may see, bool `(B, L)`.

    Returns:
        The arguments without labels, with 0 for all other tokens, and with the prompts as the attention mask.
    """
    shown = {name: value for name, value in given.items() if name != "labels"}
    if prompts is None:
        return shown
    for name in ("input_ids", "inputs_embeds"):
        if (tokens := shown.get(name)) is not None:
            shown[name] = tokens.masked_fill(~prompts if tokens.dim() == 2 else ~prompts[:, :, None], 0)
    return shown | {"attention_mask": prompts.long()}


def find_prompt(
    tokens: torch.Tensor, labels: torch.Tensor | None, mask: torch.Tensor | None, whole: bool
) -> torch.Tensor:
    """Return the tokens that a router may see, so that it learns nothing of those to predict.

    Args:
        tokens: Token ids `(B, L)` or their embeddings `(B, L, D)`.
        labels: Labels `(B, L)` as transformers shifts them, -100 where nothing is predicted; None without any.
        mask: Attention mask `(B, L)`, 0 at padding; None without padding.
        whole: True if all tokens are the prompt. It does not count where there are labels.

    Returns:
        Bool `(B, L)`: with labels, the tokens before the first one to predict; otherwise all tokens or the first.
    """
    shape = tokens.shape[:2]
    positions = torch.arange(shape[1], device=tokens.device)
    real = torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    if labels is not None and labels.shape == shape:
        predicted = (labels != -100).to(tokens.device) & (positions > 0)
        first = torch.where(predicted, positions, shape[1]).amin(1, keepdim=True)
        return real & (positions < first)
    if whole:
        return real
    return real & (real.long().cumsum(1) == 1)


def read_mask(mask: object) -> torch.Tensor | None:
    """Return the padding of an attention mask in any form that transformers takes.

    Args:
        mask: Tensor `(B, L)`, 0 at padding; tensor `(B, heads or 1, Q, L)`, bool or to be added; or a dict of such
            masks by kind of layer.

    Returns:
        Mask `(B, L)`, 0 at padding; None if there is none or its form is another.
    """
    if isinstance(mask, dict):
        found = (read_mask(value) for value in mask.values())
        return next((value for value in found if value is not None), None)
    if not torch.is_tensor(mask):
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() != 4:
        return None
    last = mask[:, 0, -1]  # a causal mask lets the last token see all that are no padding
    return last if last.dtype == torch.bool else last == 0
