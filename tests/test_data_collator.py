import io

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from testing import tiny_models
from transformers import AutoModel

from hf_dissect.data import as_pairs
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.pairs import PAIR_KEYS
from hf_dissect.data.problems import read_problems
from hf_dissect.data_collator import SelectionCollator, find_side


def png(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(sample_id: int = 0, caption="a red patch on the left", image=None, **more) -> dict:
    image = png(tiny_models.tiny_picture(sample_id)[0]) if image is None else image
    return {"image": image, "caption": caption, "sample_id": sample_id, **more}


def collator(family: str = "tiny_clip", **settings) -> SelectionCollator:
    return SelectionCollator(getattr(tiny_models, family)()[1], **settings)


def hashed(value: bytes | str) -> int:
    return xxhash.xxh3_64_intdigest(value.encode() if isinstance(value, str) else value) >> 1


# ---- what a batch holds ----


def test_keys_types_and_shapes():
    rows = [row(index, task_id=index % 2, is_clean=index > 0) for index in range(5)]
    batch = collator()(rows)
    described = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    length = batch["input_ids"].shape[1]
    assert described == {
        "pixel_values": (torch.float32, (5, 3, 32, 32)),
        "input_ids": (torch.int64, (5, length)),
        "attention_mask": (torch.int64, (5, length)),
        "sample_id": (torch.int64, (5,)),
        "image_key": (torch.int64, (5,)),
        "caption_key": (torch.int64, (5,)),
        "bad_reason": (torch.int8, (5,)),
        "bad_problem": (torch.uint8, (5, 240)),
        "task_id": (torch.int64, (5,)),
        "is_clean": (torch.bool, (5,)),
    }
    assert batch["sample_id"].tolist() == [0, 1, 2, 3, 4] and batch["task_id"].tolist() == [0, 1, 0, 1, 0]
    assert batch["is_clean"].tolist() == [False, True, True, True, True] and not batch["bad_reason"].any()
    assert set(collator()([row()])) == set(described) - {"task_id", "is_clean"}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_batch_is_what_the_model_takes(family):
    model, processor = getattr(tiny_models, family)()
    pairs = as_pairs(tiny_models.tiny_pairs(4))
    inputs = tiny_models.tiny_inputs(model, processor, [pair["caption"] for pair in pairs])
    padding = "max_length" if "siglip" in family else "longest"
    length = tiny_models.SIGLIP2_MAX_LENGTH if family == "tiny_siglip2" else tiny_models.MAX_LENGTH
    batch = SelectionCollator(processor, text_padding=padding, max_caption_length=length)(list(pairs))
    assert {name for name in batch if name not in PAIR_KEYS} == set(inputs)
    assert all(torch.equal(batch[name], inputs[name]) for name in inputs)


def test_keys_are_equal_where_bytes_or_captions_are():
    image = png(tiny_models.tiny_picture(0)[0])
    rows = [row(0, "x", image), row(1, "y", dict(image)), row(2, "x")]
    batch = collator()(rows)
    assert batch["image_key"].tolist()[:2] == [hashed(image["bytes"])] * 2
    assert batch["image_key"][2] == hashed(rows[2]["image"]["bytes"]) != batch["image_key"][0]
    assert batch["caption_key"].tolist() == [hashed("x"), hashed("y"), hashed("x")]


def test_sample_ids_may_be_any_63_bits():
    ids = [2**63 - 1, 0, 2**53 + 1]
    assert collator()([{**row(0), "sample_id": key} for key in ids])["sample_id"].tolist() == ids


# ---- captions ----


def test_captions_are_padded_to_the_longest_or_to_the_limit():
    rows = [row(0, "red"), row(1, "a red patch on the left")]
    longest = collator()(rows)
    # Each word is one token, plus start and end.
    assert longest["input_ids"].shape == (2, 8) and longest["attention_mask"].sum(1).tolist() == [3, 8]
    fixed = collator("tiny_siglip", text_padding="max_length", max_caption_length=12)(rows)
    assert fixed["input_ids"].shape == (2, 12)


def test_long_captions_are_cut():
    long = "red " * 5000
    assert collator(max_caption_length=5)([row(0, long), row(1, "red")])["input_ids"].shape == (2, 5)
    batch = collator()([row(0, long)])
    assert batch["input_ids"].shape == (1, tiny_models.MAX_LENGTH)
    # The last token stays the end token: CLIP pools there.
    assert batch["input_ids"][0, -1] == tiny_models.clip_tokenizer().eos_token_id
    assert not batch["bad_reason"].any() and batch["caption_key"][0] == hashed(long)


# ---- bad rows ----


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, BadReason.CAPTION_MISSING),
        ("", BadReason.CAPTION_MISSING),
        (" \t\n", BadReason.CAPTION_MISSING),
        (5, BadReason.CAPTION_NOT_TEXT),
        (b"red", BadReason.CAPTION_NOT_TEXT),
        (["red"], BadReason.CAPTION_NOT_TEXT),
        (float("nan"), BadReason.CAPTION_NOT_TEXT),
        ("half a pair \ud83d", BadReason.CAPTION_NOT_UNICODE),
        ("\udcff", BadReason.CAPTION_NOT_UNICODE),
    ],
)
def test_bad_captions_are_marked_and_their_images_not_decoded(caption, reason):
    batch = collator()([row(0), {**row(1), "caption": caption}, row(2)])
    assert batch["bad_reason"].tolist() == [0, reason, 0]
    assert batch["sample_id"].tolist() == [0, 1, 2]
    both = collator()([{**row(1), "caption": caption, "image": {"bytes": b"broken", "path": None}}])
    assert both["bad_reason"].tolist() == [reason]


def test_bad_images_keep_their_place_with_a_placeholder():
    good = collator()([row(0), row(2)])
    batch = collator()([row(0), row(1, image={"bytes": b"broken", "path": None}), row(2)])
    assert batch["bad_reason"].tolist() == [0, BadReason.IMAGE, 0]
    assert torch.equal(batch["pixel_values"][[0, 2]], good["pixel_values"])
    assert batch["pixel_values"].isfinite().all()


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_siglip2", "tiny_dual_encoder"])
def test_a_whole_batch_of_bad_rows_is_a_batch(family):
    padding = "max_length" if "siglip" in family else "longest"
    length = tiny_models.SIGLIP2_MAX_LENGTH if family == "tiny_siglip2" else tiny_models.MAX_LENGTH
    collate = collator(family, text_padding=padding, max_caption_length=length)
    batch = collate([row(0, None), row(1, image={"bytes": b"", "path": None})])
    assert batch["bad_reason"].tolist() == [BadReason.CAPTION_MISSING, BadReason.IMAGE]
    model = getattr(tiny_models, family)()[0]
    outputs = model(**{name: value for name, value in batch.items() if name not in PAIR_KEYS})
    assert outputs["text_embeds"].isfinite().all() and outputs["image_embeds"].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 4), (2, 9000)])
@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip2"])
def test_tiny_and_thin_images_are_good(size, family):
    padding = "max_length" if family == "tiny_siglip2" else "longest"
    batch = collator(family, text_padding=padding)([row(0), row(1, image=png(Image.new("RGB", size, (250, 0, 0))))])
    assert not batch["bad_reason"].any() and batch["pixel_values"].isfinite().all()
    assert batch["pixel_values"].shape[0] == 2


def test_a_line_of_pixels_does_not_fill_the_memory():
    image = Image.new("RGB", (1, 60_000), (250, 0, 0))

    class Watching:
        tokenizer = tiny_models.clip_tokenizer()
        model_input_names = ["pixel_values"]

        @staticmethod
        def image_processor(images, return_tensors):
            seen.extend(image.size for image in images)
            return {"pixel_values": torch.zeros(len(images), 3, 32, 32)}

    seen = []
    SelectionCollator(Watching())([row(0, image=png(image))])
    assert seen == [(8, 400)]


def test_the_problem_of_each_bad_row_is_in_the_batch(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    rows = [
        row(0),
        row(1, image={"bytes": None, "path": "/nowhere/1.jpg"}),
        row(2, image=str(tmp_path / "page.jpg")),
        row(3, image={"bytes": b"broken", "path": None}, key="shard-0/000003"),
        {**row(4), "caption": "a \ud800"},
        {**row(5), "caption": 5},
        {**row(6), "caption": None},
    ]
    assert read_problems(collator()(rows)) == {
        1: "no such file\n/nowhere/1.jpg",
        2: f"UnidentifiedImageError: not a picture, the file holds b'<html>'\n{tmp_path}/page.jpg",
        3: "UnidentifiedImageError: not a picture, the file holds b'broken'\nshard-0/000003",
        4: r"a \ud800",
        5: "int 5",
    }


def test_pairs_that_share_a_picture_have_their_own_problems():
    missing = {"bytes": None, "path": "/nowhere/1.jpg"}
    rows = [row(0, image=missing), row(1, 5, missing), row(2, image=missing), row(3), row(4, None, missing)]
    batch = collator()(rows)
    assert batch["bad_reason"].tolist() == [1, BadReason.CAPTION_NOT_TEXT, 1, 0, BadReason.CAPTION_MISSING]
    assert read_problems(batch) == {
        0: "no such file\n/nowhere/1.jpg",
        1: "int 5\n/nowhere/1.jpg",
        2: "no such file\n/nowhere/1.jpg",
    }


def test_pictures_in_any_buffer_make_the_same_batch():
    content = row(1)["image"]["bytes"]
    forms = [content, bytearray(content), np.frombuffer(content, np.uint8), list(content), io.BytesIO(content)]
    batch = collator(reads_features=False)([row(index, image=form) for index, form in enumerate(forms)])
    assert not batch["bad_reason"].any() and len(set(batch["image_key"].tolist())) == 1
    assert all(torch.equal(values, batch["pixel_values"][0]) for values in batch["pixel_values"])


@pytest.mark.parametrize("reads_features", [None, False])
def test_a_batch_of_damaged_bytes_in_arrays_is_not_one_of_feature_vectors(reads_features):
    broken = [np.frombuffer(b"<html>404</html>", np.uint8), np.zeros(16, np.uint8)]
    collate = collator(reads_features=reads_features)
    for rows in ([row(0, image=broken[0]), row(1, image=broken[1])], [row(0, image=broken[0]), row(1)]):
        batch = collate(rows)
        assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["bad_reason"][0] == BadReason.IMAGE


def test_a_vector_among_pictures_is_a_bad_row():
    batch = collator(reads_features=False)([row(0, image=np.ones(512, np.float32)), row(1)])
    assert batch["bad_reason"].tolist() == [BadReason.IMAGE, 0]
    assert read_problems(batch)[0].startswith("an array of float32 of shape (512,) is not a picture")


# ---- feature vectors ----


def test_the_problem_of_a_feature_vector_is_its_length_or_its_numbers():
    vectors = [np.ones(3), np.ones(2), np.array([1, np.inf, 2]), None, torch.ones(3), "x.jpg"]
    rows = [{"image": vector, "caption": "red", "sample_id": index} for index, vector in enumerate(vectors)]
    batch = SelectionCollator(tiny_models.clip_tokenizer(), reads_features=True)(rows)
    assert read_problems(batch) == {
        1: "feature vector of 2 numbers, not 3",
        2: "feature vector with numbers that are not finite",
        3: "no image",
        5: "str, not a feature vector of 3 numbers\nx.jpg",
    }


def test_feature_vectors_are_stacked_and_bad_ones_marked():
    vectors = [
        np.array([1.0, 2.0, 3.0], dtype=np.float32),
        [4, 5, 6.5],
        None,
        np.array([1.0, np.nan, 3.0], dtype=np.float32),
        np.array([1.0, 2.0], dtype=np.float32),
        np.array([np.inf, 0.0, 0.0], dtype=np.float64),
        {"bytes": b"x", "path": None},
    ]
    rows = [{"image": vector, "caption": "red", "sample_id": index} for index, vector in enumerate(vectors)]
    rows.append({"image": None, "caption": None, "sample_id": 7})
    batch = SelectionCollator(tiny_models.clip_tokenizer())(rows)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].tolist() == [[1, 2, 3], [4, 5, 6.5]] + [[0, 0, 0]] * 6
    bad = BadReason.IMAGE
    assert batch["bad_reason"].tolist() == [0, 0, bad, bad, bad, bad, bad, BadReason.CAPTION_MISSING]
    assert batch["image_key"][0] == hashed(vectors[0].tobytes())


def test_one_vector_of_a_wrong_length_does_not_spoil_the_others():
    lengths = [2, 3, 3]
    rows = [{"image": np.ones(n, dtype=np.float32), "caption": "red", "sample_id": n} for n in lengths]
    assert SelectionCollator(tiny_models.clip_tokenizer())(rows)["bad_reason"].tolist() == [BadReason.IMAGE, 0, 0]


def test_a_later_batch_without_any_feature_vector_is_a_batch():
    collate = SelectionCollator(tiny_models.clip_tokenizer())
    collate([{"image": np.ones(3, dtype=np.float32), "caption": "red", "sample_id": 0}])
    batch = collate([{"image": None, "caption": "red", "sample_id": 1}])
    assert batch["pixel_values"].tolist() == [[0, 0, 0]] and batch["bad_reason"].tolist() == [BadReason.IMAGE]


# ---- what cannot be collated ----


@pytest.mark.parametrize("key", ["image", "caption", "sample_id"])
def test_rows_that_are_no_pairs_are_told(key):
    broken = row(0)
    del broken[key]
    with pytest.raises(ValueError, match=f"A row has no {key}; wrap the data with hf_dissect.data.as_pairs"):
        collator()([row(1), broken])


@pytest.mark.parametrize("value", ["x.jpg", 1.5, None, True])
def test_ids_must_be_integers(value):
    with pytest.raises(ValueError, match=f"sample_id={value!r}: must be an integer"):
        collator()([row(1), {**row(0), "sample_id": value}])


def test_pictures_need_an_image_processor():
    with pytest.raises(ValueError, match="no image_processor for pictures; pass the model's whole processor"):
        SelectionCollator(tiny_models.clip_tokenizer())([row(0)])


def test_a_processor_needs_a_tokenizer_that_pads():
    with pytest.raises(ValueError, match="processing_class is a CLIPImageProcessorPil without a tokenizer"):
        SelectionCollator(tiny_models.square_image_processor())
    tokenizer = tiny_models.bert_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token"):
        SelectionCollator(tokenizer)


def test_workers_collate_as_the_main_process():
    collate, pairs = collator(), as_pairs(tiny_models.tiny_pairs(8))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, num_workers=1, collate_fn=collate)
    for number, batch in enumerate(loader):
        expected = collate(pairs.__getitems__(range(4 * number, 4 * number + 4)))
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_batch_trains_a_saved_model(tmp_path):
    model, processor = tiny_models.tiny_clip()
    model.save_pretrained(tmp_path)
    batch = SelectionCollator(processor)([row(0), row(1)])
    inputs = {name: value for name, value in batch.items() if name not in PAIR_KEYS}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)["logits_per_text"], model(**inputs)["logits_per_text"])


# ---- JPEGs at a fraction of their size ----


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_align", "tiny_siglip2"])
@pytest.mark.parametrize(("factor", "changes"), [(2, False), (3, False), (4, True), (9, True)])
def test_fast_decoding_leaves_twice_the_side_that_the_model_needs(family, factor, changes):
    side, buffer = tiny_models.IMAGE_SIZE, io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((factor * side, factor * side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    rows = [row(0, image={"bytes": buffer.getvalue()}), row(1)]
    padding = {"text_padding": "max_length"} if family == "tiny_siglip2" else {}
    plain, fast = (collator(family, fast_decoding=fast, **padding)(rows) for fast in (False, True))
    assert not fast["bad_reason"].any() and plain["pixel_values"].shape == fast["pixel_values"].shape
    keeps_sizes = family == "tiny_siglip2"  # its patches follow the size of the picture
    assert torch.equal(plain["pixel_values"], fast["pixel_values"]) is (not changes or keeps_sizes)
    assert (plain["pixel_values"] - fast["pixel_values"]).abs().mean() < 0.1
    assert torch.equal(plain["image_key"], fast["image_key"])


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"size": {"shortest_edge": 224}}, 224),
        ({"size": {"height": 96, "width": 128}}, 128),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, None),
        ({"size": {"longest_edge": 400}}, None),
        ({"size": {"shortest_edge": 224}, "do_resize": False}, None),
        ({"size": None}, None),
    ],
)
def test_the_side_that_an_image_processor_needs(settings, side):
    processor = type("Processor", (), {"do_resize": True, **settings})()
    assert find_side(processor) == side and find_side(None) is None
