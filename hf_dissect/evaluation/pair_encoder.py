"""Forward passes over pairs that embed each image and each caption once, though several pairs share them."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.distributed import get_rank_and_world_size
from hf_dissect.models.families import check_outputs
from hf_dissect.models.loading import list_networks, logit_scale_and_bias
from hf_dissect.mola import mola_routing

MAX_REMEMBERED = 2**17
"""Largest number of images, and of captions, whose embeddings are kept during a pass over a data set."""

_SIDES = {"image_embeds": "image_key", "text_embeds": "caption_key"}
_UNREADABLE = -1  # keys are not negative
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


class PairEncoder:
    """Forward passes over batches of pairs, in which pairs that share an image or a caption share its embedding.

    With five captions an image, this saves four of five passes through the vision tower. The model is called as a
    whole, but with the distinct images and captions of a batch, which may be of different numbers. A model for which
    that gives other embeddings or logits than the pairs do is called with the pairs: where a caption affects the
    embedding of its image (as in a MoLA router that reads both), where experts are chosen by the tasks of the pairs,
    where a batch is split over devices (`torch.nn.DataParallel`), and where each size of a batch is compiled. So is
    any model with batches that do not have the keys of a `SelectionCollator`, or in which nothing repeats.

    Args:
        max_remembered: Largest number of images, and of captions, to remember; the first are forgotten first.
    """

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self.max_remembered = max_remembered
        self._memory: dict[str, dict[int, torch.Tensor]] | None = None  # by side; None outside of a pass
        self._sides: dict[str, set[str]] | None = None  # names of the inputs of each side; empty for pairs as they are
        self._is_compared = False

    @contextmanager
    def remember(self) -> Iterator[None]:
        """Share embeddings between all batches of a pass, during which the weights must not change."""
        if self._memory is not None:
            yield
            return
        self._memory, self._is_compared = {side: {} for side in _SIDES}, False
        try:
            yield
        finally:
            self._memory = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], **inputs: Any) -> Mapping[str, Any]:
        """Embed the pairs of a batch.

        Args:
            model: Dual encoder, wrapped or not, in evaluation mode.
            batch: Batch of `B` pairs on the device of the model, see `SelectionCollator`.
            **inputs: Arguments of the model; none for those in `batch`.

        Returns:
            Outputs of the model for the pairs: `image_embeds` and `text_embeds` `(B, D)`, `logits_per_text` `(B, B)`.
        """
        if self._memory is None:
            with self.remember():
                return self(model, batch, **inputs)
        inputs, keys = inputs or forward_inputs(model, batch), _read_keys(batch)
        if keys is None:
            return _call(model, inputs)
        # All ranks of a sharded model must call it equally often.
        if get_rank_and_world_size()[1] > 1:
            self._compare(model, inputs, keys)
        memory = self._memory
        rows = {side: _find_new_rows(keys[side], memory[side]) for side in _SIDES}
        if all(len(new) == len(keys[side]) for side, new in rows.items()):
            outputs = _call(model, inputs)
            self._keep(outputs, keys, rows)
            self._forget()
            return outputs
        if not (sides := self._compare(model, inputs, keys)):
            return _call(model, inputs)
        # Each tower needs something to read, be it known.
        rows = {side: new or [0] for side, new in rows.items()}
        self._keep(_run(model, inputs, sides, rows), keys, rows)
        embeds = {side: torch.stack([memory[side][key] for key in keys[side]]) for side in _SIDES}
        self._forget()
        return {**embeds, "logits_per_text": _compute_logits(model, embeds)}

    def _keep(self, outputs: Mapping[str, Any], keys: Mapping[str, list[int]], rows: Mapping[str, list[int]]) -> None:
        for side, memory in cast(dict, self._memory).items():
            for row, embedding in zip(rows[side], outputs[side].detach(), strict=True):
                memory[keys[side][row]] = embedding

    def _forget(self) -> None:
        for memory in cast(dict, self._memory).values():
            for key in list(memory)[: max(len(memory) - self.max_remembered, 0)]:
                del memory[key]

    def _compare(self, model: nn.Module, inputs: Mapping[str, Any], keys: Mapping[str, list[int]]) -> dict[str, set]:
        """Return the names of the inputs of each side, or nothing for a model that must see the pairs."""
        if not self._is_compared:
            self._is_compared, self._sides = True, None
            if not _must_see_pairs(model) and (sides := _divide_inputs(model, inputs, len(keys["image_embeds"]))):
                self._sides = sides if _embeds_alike(model, inputs, sides, keys) else None
        return self._sides or {}


def _read_keys(batch: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Return the keys of the images and captions of a batch; unreadable pairs share a key of their own."""
    if any(key not in batch for key in _SIDES.values()):
        return None
    bad_reason = batch.get("bad_reason")
    # A placeholder may stand for the image of a pair without a caption.
    is_bad = torch.zeros_like(batch["image_key"], dtype=torch.bool) if bad_reason is None else bad_reason != 0
    return {side: batch[key].masked_fill(is_bad, _UNREADABLE).tolist() for side, key in _SIDES.items()}


def _find_new_rows(keys: Sequence[int], known: Mapping[int, Any]) -> list[int]:
    """Return the first row of each key that is not known."""
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return sorted(row for key, row in first.items() if key not in known)


def _must_see_pairs(model: nn.Module) -> bool:
    if isinstance(model, nn.DataParallel):
        return True
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        return True
    routing = mola_routing(model)
    if routing is None:
        return False
    return routing.towers == ["model"] or any("all" in router.branches for _, router in routing.get_active_routers())


def _divide_inputs(model: nn.Module, inputs: Mapping[str, Any], size: int) -> dict[str, set[str]] | None:
    """Return the names of the inputs of each side; None if an input is not one of a single side, a row for a pair."""
    network: Any = list_networks(model)[0]
    methods: dict[str, Callable] = {
        "image_embeds": network.get_image_features,
        "text_embeds": network.get_text_features,
    }
    names = {side: inputs.keys() & inspect.signature(method).parameters for side, method in methods.items()}
    image, text = names.values()
    if image & text or image | text != inputs.keys() or not image or not text:
        return None
    if any(not torch.is_tensor(value) or value.dim() == 0 or len(value) != size for value in inputs.values()):
        return None
    return names


def _run(
    model: nn.Module, inputs: Mapping[str, Any], sides: Mapping[str, set[str]], rows: Mapping[str, list[int]]
) -> Mapping[str, Any]:
    """Call the model with some rows of the inputs of each side."""
    return _call(model, {name: inputs[name][rows[side]] for side, names in sides.items() for name in names})


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call the model, and add the logits if it returns none."""
    outputs = model(**inputs)
    check_outputs(outputs)
    if outputs.get("logits_per_text") is not None:
        return outputs
    return {**outputs, "logits_per_text": _compute_logits(model, outputs)}


def _embeds_alike(
    model: nn.Module, inputs: Mapping[str, Any], sides: Mapping[str, set[str]], keys: Mapping[str, list[int]]
) -> bool:
    """Compare the outputs for two pairs with those for their images and captions in other combinations."""
    columns = list(zip(*keys.values(), strict=True))
    different = (row for row, (image, text) in enumerate(columns) if image != columns[0][0] and text != columns[0][1])
    both, one = [0, next(different, len(columns) - 1)], [0]
    try:
        pairs = _run(model, inputs, sides, dict.fromkeys(sides, both))
        one_image = _run(model, inputs, sides, {"image_embeds": one, "text_embeds": both})
        one_text = _run(model, inputs, sides, {"image_embeds": both, "text_embeds": one})
        return all(
            _are_close(values, expected)
            for values, expected in (
                (one_image["text_embeds"], pairs["text_embeds"]),
                (one_image["image_embeds"], pairs["image_embeds"][:1]),
                (one_text["image_embeds"], pairs["image_embeds"]),
                (one_text["text_embeds"], pairs["text_embeds"][:1]),
                (_compute_logits(model, pairs), pairs["logits_per_text"]),
            )
        )
    except _ERRORS:  # of a model that reads as many images as captions
        return False


def _are_close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-4 if _find_precision(expected) in (torch.float32, torch.float64) else 5e-2
    return values.shape == expected.shape and torch.allclose(
        values.double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def _find_precision(values: torch.Tensor) -> torch.dtype:
    """Return the type in which values were computed: accelerate returns those of mixed precision as float32."""
    if values.dtype == torch.float32:
        halves = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values.to(dtype).float(), values))
        return next(halves, torch.float32)
    return values.dtype


def _compute_logits(model: nn.Module, embeds: Mapping[str, Any]) -> torch.Tensor:
    """Compute the logits `(B, B)` of each caption with each image, as the model does from its embeddings."""
    scale, bias = logit_scale_and_bias(model)
    texts, images = (embeds[side] for side in ("text_embeds", "image_embeds"))
    precision = _find_precision(texts)
    logits = texts.to(precision) @ images.to(precision).t() * scale.mean() + bias.mean()
    return logits.to(texts.dtype)
