import io
import warnings

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hf_dissect.data.images import UnusableImage, decode_image, image_content, is_feature_vector


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def as_row(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def pixels(value) -> list:
    image = decode_image(value)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


CHECKERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)


def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(CHECKERS)
    content = encoded(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for value in (
        as_row(content),
        {"bytes": None, "path": str(path)},
        {"bytes": b"", "path": str(path)},
        content,
        str(path),
        path,
        image,
        CHECKERS,
        CHECKERS.tolist(),
    ):
        assert pixels(value) == CHECKERS.tolist()


def test_palette_keeps_its_colours_and_puts_transparency_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(as_row(encoded(palette, "PNG"))) == [[[200, 100, 50], [0, 0, 0]]]
    assert pixels(as_row(encoded(palette, "PNG", transparency=1))) == [[[200, 100, 50], [255, 255, 255]]]
    assert pixels(as_row(encoded(palette, "PNG", transparency=bytes([255, 0])))) == [[[200, 100, 50], [255] * 3]]


def test_cmyk_becomes_the_colours_it_prints():
    # No ink is white, full black ink is black, full cyan ink takes away the red.
    for inks, colour in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
    ):
        content = encoded(Image.new("CMYK", (8, 8), inks), "JPEG", quality=95)
        assert np.abs(np.array(pixels(as_row(content))) - colour).max() <= 3


def test_alpha_is_put_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (100, 0, 200, alpha))
    blended = [round(part * 128 / 255 + 255 * 127 / 255) for part in (100, 0, 200)]
    found = np.array(pixels(as_row(encoded(image, "PNG"))))
    assert np.abs(found - [[[100, 0, 200], blended, [255, 255, 255]]]).max() <= 1
    grey = Image.new("LA", (1, 1), (40, 0))
    assert pixels(as_row(encoded(grey, "PNG"))) == [[[255, 255, 255]]]
    keyed = encoded(Image.fromarray(CHECKERS), "PNG", transparency=(0, 255, 0))
    assert pixels(as_row(keyed))[0] == [[255, 0, 0], [255, 255, 255]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 257 * 100, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), "PNG")
    assert pixels(as_row(content)) == [[[0] * 3, [1] * 3, [100] * 3, [255] * 3]]


def test_floats_are_stretched_from_black_to_white_and_nan_is_unusable():
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    assert pixels(Image.fromarray(values)) == [[[0] * 3, [128] * 3, [255] * 3]]
    with pytest.raises(UnusableImage, match="not finite"):
        decode_image(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 10, 10), (10, 10, 250))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, loop=0, **lossless)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert np.abs(np.array(pixels(as_row(content))) - (250, 10, 10)).max() <= 8


def test_grey_bilevel_single_pixel_and_line_images():
    assert pixels(as_row(encoded(Image.new("L", (1, 1), 77), "PNG"))) == [[[77] * 3]]
    assert pixels(as_row(encoded(Image.new("1", (2, 1), 1), "PNG"))) == [[[255] * 3, [255] * 3]]
    assert decode_image(as_row(encoded(Image.new("RGB", (1, 200), "red"), "PNG"))).size == (1, 200)


def test_the_orientation_of_cameras_is_obeyed():
    image = Image.fromarray(np.repeat(np.repeat(CHECKERS, 8, axis=0), 16, axis=1))
    tags = Image.Exif()
    tags[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned = decode_image(as_row(encoded(image, "JPEG", quality=100, subsampling=0, exif=tags)))
    assert turned.size == (16, 32)
    clockwise = np.rot90(np.asarray(image), k=-1)
    assert np.abs(np.asarray(turned).astype(int) - clockwise).max() <= 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("tags", [b"Exif\x00\x00garbage, not TIFF", b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"])
def test_damaged_tags_do_not_cost_the_picture(tags):
    assert pixels(as_row(encoded(Image.fromarray(CHECKERS), "PNG", exif=tags))) == CHECKERS.tolist()


def huge_header() -> bytes:
    # A PNG that claims 60,000 x 60,000 pixels.
    content = encoded(Image.new("L", (1, 1)), "PNG")
    side = (60_000).to_bytes(4, "big")
    header = b"IHDR" + side + side + content[24:29]
    return content[:12] + header + PngImagePlugin._crc32(header).to_bytes(4, "big") + content[33:]


BAD_IMAGES = {
    "missing": None,
    "no bytes, no path": {"bytes": None, "path": None},
    "other keys": {"url": "x"},
    "zero bytes": as_row(b""),
    "not an image": as_row(b"hello, I am a text file" * 20),
    "no such file": {"bytes": None, "path": "/nowhere/picture.png"},
    "truncated JPEG": as_row(encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:-200]),
    "truncated PNG": as_row(
        encoded(Image.fromarray(np.arange(12288, dtype=np.uint8).reshape(64, 64, 3)), "PNG")[:150]
    ),
    "truncated GIF": as_row(encoded(Image.effect_noise((64, 64), 90), "GIF")[:900]),
    "only a header": as_row(encoded(Image.new("RGB", (64, 64)), "PNG")[:20]),
    "decompression bomb": as_row(huge_header()),
    "empty list": [],
    "ragged list": [[1], [1, 2]],
    "float array": np.zeros((4, 4, 3), dtype=np.float32),
    "out of range": np.full((4, 4, 3), 300),
    "channels first": np.zeros((3, 8, 8), dtype=np.uint8),
    "a number": 5,
}


@pytest.mark.parametrize("case", list(BAD_IMAGES))
def test_what_is_no_image_is_unusable_and_nothing_else_is_raised(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnusableImage, match="."):
            decode_image(BAD_IMAGES[case])


@pytest.mark.parametrize("case", list(BAD_IMAGES))
def test_the_content_of_bad_images_can_still_be_hashed(case):
    content = image_content(BAD_IMAGES[case])
    assert content is None or isinstance(content, bytes)


def test_content_is_the_file_or_the_pixels(tmp_path):
    content = encoded(Image.fromarray(CHECKERS), "PNG")
    assert image_content(as_row(content)) == image_content(content) == content
    assert image_content({"bytes": None, "path": "a.png"}) == image_content("a.png") == b"a.png"
    assert image_content(None) is None and image_content(as_row(b"")) is None
    tall, wide = Image.new("L", (2, 8)), Image.new("L", (8, 2))
    assert image_content(tall) != image_content(wide) and image_content(tall) == image_content(tall.copy())
    vector = np.arange(3, dtype=np.float32)
    assert image_content(vector) == vector.tobytes()


def test_feature_vectors_are_told_from_pictures():
    assert is_feature_vector(np.zeros(4, dtype=np.float32)) and is_feature_vector([0.5, 1])
    for value in (None, [], np.zeros((2, 2)), [[1.0]], [[1], [1, 2]], "abc", b"abc", {"bytes": b""}, ["a"], [None]):
        assert not is_feature_vector(value)
