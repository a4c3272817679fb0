"""A schedule of sizes says the size of each step, and pictures are prepared in it."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from testing import tiny_models
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect import SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.data.image_processing import find_processing
from hf_dissect.data.image_sizes import ImageSizes, find_size_fault
from hf_dissect.data.images import UnusableImage, decode_image
from hf_dissect.data.sized_batches import SizedBatchSampler, SizedCollator, SizedPairs, SizedPick


def test_each_step_has_its_size():
    sizes = ImageSizes({0.0: 112, 0.5: 160, 0.8: 224})
    assert sizes.sides == [112, 160, 224] and sizes.constant is None
    assert [sizes.find(step, 10) for step in range(10)] == [112] * 5 + [160] * 3 + [224] * 2
    # From the first step at or after the share: 0.5 * 7 = 3.5 and 0.8 * 7 = 5.6.
    assert [sizes.find(step, 7) for step in range(7)] == [112] * 4 + [160] * 2 + [224]
    assert [ImageSizes({0: 8, 0.1: 16}).find(step, 30) for step in (2, 3)] == [8, 16]  # 0.1 * 30 is 3.0000000000000004
    assert ImageSizes(96).constant == 96 and ImageSizes(96).find(3, 10) == 96
    assert ImageSizes('{"0.8": 224, "0": 112}').as_setting() == {"0": 112, "0.8": 224}
    assert ImageSizes("112").as_setting() == 112
    assert ImageSizes(ImageSizes({0: 8, 1 / 3: 16}).as_setting()).find(10, 30) == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "0 is not allowed"),
        (1.5, "1.5 is not allowed"),
        ({}, "{} is not allowed"),
        ([112, 224], "is not allowed"),
        ({0.0: 112, 1.0: 224}, "the share is in"),
        ({-0.1: 112}, "the share is in"),
        ({"soon": 112}, "'soon': 112"),
        ({0: "112"}, "the side an integer"),
        ({0: 112.0}, "the side an integer"),
        ({False: 112}, "False: 112"),
        ({0: 112, "0.0": 224}, "each is there once"),
        ({0.2: 112}, "the first share is 0"),
        ({0: 112, 0.5: 112}, "the same side"),
        ({0: 112, float("nan"): 224}, "the share is in"),
    ],
)
def test_a_faulty_schedule_says_why(given, message):
    assert message in find_size_fault(given)
    with pytest.raises(ValueError):
        ImageSizes(given)


def photograph(width: int, height: int, form: str = "JPEG", **options) -> bytes:
    down, right = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * down / height, 255 * right / width, 128 + 60 * np.sin(right / 40)], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, form, **options)
    return buffer.getvalue()


def test_a_jpeg_is_decoded_at_a_part_of_its_size():
    content = photograph(640, 480)
    assert decode_image(content).size == (640, 480)
    for side, size in ((300, (640, 480)), (240, (320, 240)), (112, (160, 120)), (60, (80, 60)), (8, (80, 60))):
        small = decode_image(content, side)
        assert small.size == size and min(size) >= side
        whole = decode_image(content).resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(small, float) - np.asarray(whole, float)).mean() < 3
    assert decode_image(photograph(640, 480, "PNG"), 60).size == (640, 480)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(photograph(640, 480, exif=exif), 112).size == (120, 160)
    with pytest.raises(UnusableImage, match="truncated"):
        decode_image(content[:2000], 112)


def test_a_processor_scales_what_it_resizes_and_crops():
    clip = CLIPImageProcessorPil()
    assert find_processing(clip, None).keywords == {} and find_processing(clip, 224).smallest_side is None
    small = find_processing(clip, 112)
    assert small.keywords == {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    assert small.smallest_side == 112
    edged = CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert find_processing(edged, 112).keywords["size"] == {"shortest_edge": 128}
    for processor, size, message in (
        (clip, 300, "above the 224 pixels"),
        (CLIPImageProcessorPil(do_resize=False, do_center_crop=False), 16, "resizes pictures to one square size"),
        (CLIPImageProcessorPil(do_center_crop=False), 112, "resizes pictures to one square size"),
        (tiny_models.tiny_siglip2()[1].image_processor, 16, "resizes pictures to one square size"),
    ):
        with pytest.raises(ValueError, match=message):
            find_processing(processor, size)


def test_a_collator_prepares_smaller_pictures_for_a_while():
    _, processor = tiny_models.tiny_clip()
    collator = SelectionCollator(processor)
    content = photograph(640, 480)
    images = [{"bytes": content, "path": None}, tiny_models.tiny_picture(1)[0], {"bytes": content, "path": None}]
    rows = [{"image": image, "caption": "a", "sample_id": number} for number, image in enumerate(images)]
    whole = collator(rows)
    with collator.at_size(16):
        small = collator(rows)
    assert small["pixel_values"].shape == (3, 3, 16, 16) and whole["pixel_values"].shape == (3, 3, 32, 32)
    drafted = decode_image(content, 16)
    wanted = processor.image_processor(images=[drafted], size={"height": 16, "width": 16}, return_tensors="pt")
    assert torch.equal(small["pixel_values"][0], wanted["pixel_values"][0])
    assert all(torch.equal(small[name], whole[name]) for name in whole if name != "pixel_values")
    assert torch.equal(collator(rows)["pixel_values"], whole["pixel_values"])


def test_sizes_survive_the_way_to_a_worker_that_is_started_anew():
    _, processor = tiny_models.tiny_clip()
    collator, sizes = SelectionCollator(processor), ImageSizes({0: 16, 0.5: 32})
    pairs, collate = pickle.loads(
        pickle.dumps((SizedPairs(as_pairs(tiny_models.tiny_pairs(8))), SizedCollator(collator, collator)))
    )
    sampler = SizedBatchSampler([[0, 1], [2, 3], [4, 5], [6, 7]], sizes, lambda: (0, 4), 1)
    batches = [pickle.loads(pickle.dumps(indices)) for indices in sampler]
    found = [collate(pairs.__getitems__(indices)) for indices in batches]
    assert [batch["pixel_values"].shape[-1] for batch in found] == [16, 16, 32, 32]
    assert [batch["sample_id"].tolist() for batch in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert collate(pairs.__getitems__([0, 1]))["pixel_values"].shape[-1] == 32, "batches without a step are whole"
    pick = SizedPick(sizes, lambda: (1, 4), 2).begin(10)
    assert [pickle.loads(pickle.dumps(pick))([{}], number).image_size for number in (10, 11, 12)] == [16, 16, 32]


def test_the_batches_of_an_epoch_count_from_its_first_step():
    batches = [[number] for number in range(5)]  # with two batches a step, steps of 2, 2 and 1
    for step, first in ((0, 0), (2, 0), (3, 3), (5, 3)):
        sampler = SizedBatchSampler(batches, ImageSizes({0: 8, 0.5: 16}), lambda step=step: (step, 8), 2)
        wanted = [8 if first + number // 2 < 4 else 16 for number in range(5)]
        assert [indices.image_size for indices in sampler] == wanted and len(sampler) == 5
