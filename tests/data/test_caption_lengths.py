"""Captions padded to a few lengths: the shapes, and that no embedding changes."""

import pytest
import torch
from testing import tiny_models
from testing.trained_towers import TEXT, save_text_tower, save_vision_tower

from hf_dissect.data.caption_lengths import choose_caption_lengths, pad_captions
from hf_dissect.data_collator import SelectionCollator
from hf_dissect.models.families import find_text_padding
from hf_dissect.models.loading import load_model_and_processor

SHORT, MIDDLE, LONG = "red", "a red patch on the left", "there is purple at the bottom " * 9
FAMILIES = [family for family in tiny_models.FAMILIES if "siglip" not in family]


def rows_of(*captions: str) -> list[dict]:
    pairs = tiny_models.tiny_pairs(len(captions))
    return [{"image": pairs[k]["image"], "caption": text, "sample_id": k} for k, text in enumerate(captions)]


@pytest.mark.parametrize(
    ("given", "limit", "is_compiled", "lengths"),
    [
        (None, 77, False, ()),
        (None, 77, True, (16, 32, 48, 64, 77)),
        (None, 64, True, (16, 32, 48, 64)),
        (None, 512, True, (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
        (None, 33, True, (16, 32, 33)),
        (None, 20, True, (16, 20)),
        (None, 65, True, (16, 32, 48, 64, 65)),
        (None, 17, True, (16, 17)),
        (None, 16, True, (16,)),
        (None, 15, True, (15,)),
        (None, 1, True, (1,)),
        ([], 77, True, ()),
        ([], 77, False, ()),
        ([32, 8, 32], 77, False, (8, 32, 77)),
        ([77], 77, True, (77,)),
    ],
)
def test_the_limit_is_always_the_last_length(given, limit, is_compiled, lengths):
    assert choose_caption_lengths(given, limit, "longest", is_compiled) == lengths


@pytest.mark.parametrize(
    ("given", "padding", "message"),
    [
        ([16, 78], "longest", r"caption_lengths=\[16, 78\].*78 is beyond the 77 tokens.*max_caption_length"),
        ([16], "max_length", r"caption_lengths=\[16\].*reads captions of 77 tokens only; leave it out"),
        ([16], "features", r"caption_lengths=\[16\].*reads stored features of the captions; leave it out"),
    ],
)
def test_lengths_without_a_use_are_refused(given, padding, message):
    with pytest.raises(ValueError, match=message):
        choose_caption_lengths(given, 77, padding)


@pytest.mark.parametrize("padding", ["max_length", "features"])
@pytest.mark.parametrize("given", [None, []])
def test_a_model_that_knows_one_length_keeps_it(padding, given):
    assert choose_caption_lengths(given, 77, padding, is_compiled=True) == ()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("captions", [[SHORT], [SHORT, MIDDLE], [LONG, SHORT], [""], ["", SHORT, MIDDLE]])
@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]])
def test_the_padding_is_that_of_the_tokenizer(side, captions, names):
    tokenizer = tiny_models.bert_tokenizer()
    tokenizer.padding_side, tokenizer._pad_token_type_id, tokenizer.model_input_names = side, 3, names
    collate = SelectionCollator(tokenizer, caption_lengths=(5, 11, 16))
    longest = tokenizer(captions, padding="longest", truncation=True, return_tensors="pt")
    length = next(length for length in (5, 11, 16) if length >= longest["input_ids"].shape[1])
    expected = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    padded = pad_captions(dict(longest), collate.caption_lengths, collate.padding)
    assert padded.keys() == expected.keys() == set(names)
    assert all(torch.equal(padded[name], expected[name]) for name in padded)


def test_captions_longer_than_every_length_stay_as_they_are():
    captions = {"input_ids": torch.ones(2, 9, dtype=torch.int64), "spans": torch.zeros(2, 9, 2)}
    padded = pad_captions(dict(captions), (4, 8), {})
    assert all(padded[name] is captions[name] or torch.equal(padded[name], captions[name]) for name in captions)


def check_same_embeddings(model, processor, **settings) -> None:
    settings = {"text_padding": find_text_padding(model), "max_caption_length": 16, **settings}
    shapes = set()
    for captions in ([SHORT, SHORT], [SHORT, MIDDLE], [MIDDLE, LONG], [LONG, SHORT], ["", MIDDLE]):
        few = SelectionCollator(processor, caption_lengths=(6, 11, 16), **settings)(rows_of(*captions))
        any_length = SelectionCollator(processor, **settings)(rows_of(*captions))
        shapes.add(few["input_ids"].shape[1])
        texts = [{name: batch[name] for name in processor.tokenizer.model_input_names} for batch in (few, any_length)]
        with torch.no_grad():
            found, expected = (model.get_text_features(**text).pooler_output for text in texts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert shapes == {6, 11, 16}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_reads_the_padding(family):
    check_same_embeddings(*getattr(tiny_models, family)())


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("pooling", ["mean", "cls", "eot"])
def test_no_text_tower_reads_the_padding(kind, pooling, tmp_path):
    vision, text = save_vision_tower(tmp_path / "v"), save_text_tower(tmp_path / "t", kind)
    towers = {"vision": {"name_or_path": vision}, "text": {"name_or_path": text, "pooling": pooling}}
    check_same_embeddings(*load_model_and_processor(**towers, projection_dim=24))


def test_shapes_are_few_with_lengths_with_one_length_and_without_tokens():
    clip, siglip = tiny_models.tiny_clip()[1], tiny_models.tiny_siglip()[1]
    assert not SelectionCollator(clip).has_few_shapes
    assert SelectionCollator(clip, caption_lengths=(8, 16)).has_few_shapes
    assert SelectionCollator(siglip, text_padding="max_length").has_few_shapes
    assert SelectionCollator(clip.image_processor, text_feature_size=8).has_few_shapes
