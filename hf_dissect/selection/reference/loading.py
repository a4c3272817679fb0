"""Loading of the reference model that a strategy needs, and checks that it fits model and data."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from hf_dissect.models.families import check_dual_encoder, check_tokens
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.loading import LOADING_ERRORS, find_loss_kind, load_model_and_processor
from hf_dissect.models.picture_check import check_same_pictures
from hf_dissect.selection.reference.model import ReferenceModel
from hf_dissect.selection.strategy import SelectionStrategy

SETTING = "selection_reference (selection.reference in a recipe)"
_CAPTIONS = ("a photo of 2 red dogs on the left", "Zwei Hunde, naïvely drawn; 'it''s' #7!", "x", "word " * 300)


def load_reference(
    strategy: SelectionStrategy,
    given: nn.Module | None,
    model: nn.Module,
    args: Any,
    pairs: Any,
    collator: Any,
    make_collator: Callable[..., Any],
) -> ReferenceModel | None:
    """Load the reference model of a run, and check that it fits; None for a strategy that needs none.

    Args:
        strategy: Strategy of the run.
        given: Reference as a model in memory, which is frozen; None for the one that `args` names.
        model: Model that trains.
        args: Arguments of the run, with `selection_reference` and `device`.
        pairs: Training pairs, or None.
        collator: Collator of the run.
        make_collator: Function that makes the collator of a model and its processor for `args`.

    Raises:
        ValueError: The reference is missing, not needed, or does not fit; the message names the setting.
        OSError: The reference cannot be read or downloaded.
    """
    source = args.selection_reference
    has_one = source is not None or given is not None
    if not strategy.reference:
        if has_one:
            raise ValueError(
                f"{SETTING} is {_show(source, given)}, and the strategy {strategy.name!r} compares with no reference; "
                "leave it out, or choose a strategy that does."
            )
        return None
    if not has_one:
        raise ValueError(
            f"{SETTING} is missing: the strategy {strategy.name!r} needs a reference model; set it to the Hub id or "
            "the folder of a trained dual encoder, or pass reference_model."
        )
    if source is not None and given is not None:
        raise ValueError(f"{SETTING} is {source!r}, and reference_model is given, too; pass one of them.")
    if strategy.reference == "before" and pairs is not None and not hasattr(pairs, "__len__"):
        raise ValueError(
            f"selection_strategy {strategy.name!r} scores all pairs before the first step, which a stream does not "
            "allow; set data.streaming to false, or take learnability, rho or jest."
        )
    processor = None
    if given is None:
        try:
            given, processor = load_model_and_processor(name_or_path=source)
        except (*LOADING_ERRORS, ValueError) as error:
            raise type(error)(f"{SETTING}: {str(error).replace('name_or_path', 'the reference')}") from error
    where = f"{SETTING} {_show(source, given)}"
    _check_other_model(where, given, model)
    check_dual_encoder(given)
    _check_kind(where, given, model, strategy)
    _check_inputs(where, given, processor, model, collator, partial(make_collator, args=args))
    given.to(args.device)
    reference = ReferenceModel(given, source)
    _check_forward(where, reference, pairs, collator, model, args.device)
    return reference


def _show(source: str | None, given: nn.Module | None) -> str:
    return repr(source) if source is not None else f"a {type(given).__name__}"


def _check_other_model(where: str, reference: nn.Module, model: nn.Module) -> None:
    places = {weight.data_ptr() for weight in model.parameters()}
    if any(weight.data_ptr() in places for weight in reference.parameters()):
        raise ValueError(f"{where} shares weights with the model that trains, and would be frozen; pass a copy.")


def _check_kind(where: str, reference: nn.Module, model: nn.Module, strategy: SelectionStrategy) -> None:
    theirs, ours = find_loss_kind(reference), find_loss_kind(model)
    if strategy.reference != "before" and theirs != ours:
        raise ValueError(
            f"{where} has the {theirs} loss and the model that trains the {ours} loss, whose values cannot be "
            "subtracted; take a reference of the same kind, or the strategy coreset, which compares no losses."
        )


def _check_inputs(
    where: str, reference: nn.Module, processor: Any, model: nn.Module, collator: Any, make_collator: Any
) -> None:
    """Check that both models read the same inputs: features of the same size, or equal pixels and tokens."""
    for tower, name in (("vision", "images"), ("text", "captions")):
        theirs, ours = find_feature_size(reference, tower), find_feature_size(model, tower)
        if theirs != ours:
            kinds = [f"stored features of {size} numbers" if size else name for size in (theirs, ours)]
            raise ValueError(
                f"{where} reads {kinds[0]} where the model that trains reads {kinds[1]}; take a reference that reads "
                "the same inputs."
            )
    tokenizer = getattr(collator, "tokenizer", None)
    if tokenizer is not None and processor is None:
        try:
            check_tokens(reference, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
    if processor is None or tokenizer is None and getattr(collator, "image_processor", None) is None:
        return
    try:
        own = make_collator(reference, processor)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_tokenizers(where, own, collator)
    _check_pictures(where, own, collator)


def _check_tokenizers(where: str, own: Any, collator: Any) -> None:
    if getattr(collator, "tokenizer", None) is None or own.tokenizer is None:
        return
    length, limit = collator.max_caption_length, own.max_caption_length
    if length is None or length > limit:
        raise ValueError(
            f"{where} reads captions of at most {limit} tokens, and the model that trains {length or 'more'}; set "
            f"max_caption_length (model.max_caption_length) to {limit}."
        )
    way_out = (
        "both read the same tokens. Set model.tokenizer to that of the reference for a model from scratch, or take a "
        "reference with the tokenizer of the model"
    )
    if "max_length" in (own.text_padding, collator.text_padding) and (own.text_padding, limit) != (
        collator.text_padding,
        length,
    ):
        raise ValueError(
            f"{where} reads captions padded as {own.text_padding} ({limit} tokens), the model that trains as "
            f"{collator.text_padding} ({length} tokens), and {way_out}."
        )
    encoded = [
        part.tokenizer(list(_CAPTIONS), truncation=True, max_length=length)["input_ids"] for part in (own, collator)
    ]
    if encoded[0] != encoded[1] or own.tokenizer.get_vocab() != collator.tokenizer.get_vocab():
        raise ValueError(f"{where} has another tokenizer than the model that trains, and {way_out}.")


def _check_pictures(where: str, own: Any, collator: Any) -> None:
    if getattr(collator, "image_processor", None) is None or own.image_processor is None or own.reads_features:
        return
    check_same_pictures(where, own.image_processor, collator.image_processor, "a reference")


def _check_forward(
    where: str, reference: ReferenceModel, pairs: Any, collator: Any, model: nn.Module, device: torch.device
) -> None:
    """Score a few pairs, so that a reference that cannot read them fails now."""
    if hasattr(pairs, "__len__"):
        rows = [pairs[number] for number in range(min(4, len(pairs)))]
    else:
        rows = _make_rows(model)
    try:
        batch = {name: value.to(device) for name, value in _collate(collator, rows).items()}
        reference.score(batch, batch["sample_id"].cpu())
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{where} cannot read the inputs of the model that trains: {error}") from error


def _collate(collator: Any, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    state = torch.get_rng_state()
    try:
        return collator(rows)
    finally:
        torch.set_rng_state(state)


def _make_rows(model: nn.Module) -> list[Mapping[str, Any]]:
    """Make two pairs in place of those of a stream, which is not read ahead."""
    size, text_size = find_feature_size(model, "vision"), find_feature_size(model, "text")
    image = Image.radial_gradient("L").convert("RGB") if size is None else torch.ones(size).numpy()
    row = {"image": image, "caption": _CAPTIONS[0], "sample_id": 0, "task_id": 0}
    return [row if text_size is None else {**row, "text_features": torch.ones(text_size).numpy()}] * 2
