"""Padding of captions to a few lengths, so that a compiled model sees a few shapes and not one for each length."""

from collections.abc import Iterator, Mapping, Sequence

import torch

SHORTEST = 16
"""Shortest length of captions, in tokens, for a compiled model."""


def choose_caption_lengths(
    given: Sequence[int] | None, limit: int, padding: str, is_compiled: bool = False
) -> tuple[int, ...]:
    """Choose the lengths to which the captions of a batch are padded.

    Args:
        given: Lengths in tokens, to which the limit is added; empty for none. None for 16, 32, 48, 64, 96, 128, ...
            below the limit if the model is compiled, otherwise none.
        limit: Number of tokens after which captions are cut.
        padding: Padding of the model, "longest" or "max_length"; "features" for one that reads no tokens.
        is_compiled: True for a compiled model.

    Returns:
        Lengths, ascending, the last one the limit; empty to pad as `padding` says.

    Raises:
        ValueError: The model pads otherwise, or a length is beyond the limit.
    """
    if given and padding != "longest":
        reads = "stored features of the captions" if padding == "features" else f"captions of {limit} tokens only"
        raise ValueError(
            f"caption_lengths={list(given)} (model.caption_lengths in a recipe) has no effect on a model that reads "
            f"{reads}; leave it out."
        )
    if padding != "longest" or (given is None and not is_compiled) or (given is not None and not given):
        return ()
    if given is None:
        return (*(length for length in _list_lengths(limit) if length < limit), limit)
    if max(given) > limit:
        raise ValueError(
            f"caption_lengths={list(given)} (model.caption_lengths in a recipe): {max(given)} is beyond the {limit} "
            "tokens after which captions are cut; lower it, or raise max_caption_length if the model reads more."
        )
    return tuple(sorted({*given, limit}))


def _list_lengths(limit: int) -> Iterator[int]:
    """Yield 16, 32, 48, 64, 96, 128, 192, ...: the shortest, and from its double on two lengths in each doubling."""
    yield SHORTEST
    length = 2 * SHORTEST
    while length < limit:
        yield length
        yield length * 3 // 2
        length *= 2


def pad_captions(
    captions: dict[str, torch.Tensor], lengths: Sequence[int], padding: Mapping[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    """Pad captions to the first of some lengths that is enough.

    Args:
        captions: Output of a tokenizer, tensors `(B, L)` by name.
        lengths: Lengths in tokens, ascending; empty to leave the captions as they are.
        padding: Value and side ("left" or "right") of the padding by name; 0 on the right for other names.

    Returns:
        Tensors `(B, length)`; as they are if no length is enough.
    """
    if not lengths:
        return captions
    longest = captions["input_ids"].shape[1]
    lacking = next((length for length in lengths if length >= longest), longest) - longest
    padded = {}
    for name, tokens in captions.items():
        value, side = padding.get(name, (0, "right"))
        sides = (lacking, 0) if side == "left" else (0, lacking)
        padded[name] = torch.nn.functional.pad(tokens, sides, value=value) if tokens.dim() == 2 else tokens
    return padded
