import array
import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, PngImagePlugin, features

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


def grey_levels(value) -> list[int]:
    """Levels of the first row of a grey picture."""
    row = np.asarray(decode_image(value))[0]
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


def test_floats_have_a_usual_range_or_are_stretched_and_nan_is_unusable():
    def made(values):
        return Image.fromarray(np.array([values], dtype=np.float32))

    assert grey_levels(made([0.0, 0.2, 0.4])) == [0, 51, 102]  # 0.2 * 255
    assert grey_levels(made([0.0, 10.0, 200.0])) == [0, 10, 200]
    assert grey_levels(made([-1.0, 0.0, 1.0])) == [0, 128, 255]  # no usual range: from the darkest to the lightest
    assert grey_levels(Image.fromarray(np.array([[0, 5, 200]], dtype=np.int32))) == [0, 5, 200]
    assert grey_levels(Image.fromarray(np.array([[0, 257 * 3, 257 * 200]], dtype=np.int32))) == [0, 3, 200]
    assert grey_levels(Image.fromarray(np.array([[-100_000, 0, 100_000]], dtype=np.int32))) == [0, 128, 255]
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


# ---- 16 bits ----

LEVELS = np.array([[0, 3, 40, 100, 128, 9]] * 2, dtype=np.uint16)
"""A dark picture: stretched over its own range, it would be another."""


def pnm(head: str, values: np.ndarray) -> bytes:
    return head.encode() + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """Write a TIFF of one strip, since Pillow writes few kinds."""
    height, width = values.shape
    if bits == 12:
        two = values.reshape(-1, 2).tolist()
        strip = b"".join((first << 12 | second).to_bytes(3, "big") for first, second in two)
    else:
        strip = values.astype(f"{order}{'i' if sample_format == 2 else 'u'}2").tobytes()
    entries = [
        (256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 3, height), (279, 4, len(strip)), (339, 3, sample_format),
    ]  # fmt: skip
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(strip)) + strip
    content += struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        content += struct.pack(order + "HHI", tag, kind, 1) + packed
    return content + bytes(4)


def rgb16_png(values: np.ndarray) -> bytes:
    """Write a PNG of three channels of 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


WIDE = LEVELS * 257  # 16 bits whose 8-bit levels are LEVELS
SIXTEEN_BITS = {
    "PNG": encoded(Image.fromarray(WIDE), "PNG"),
    "PNG of three channels": rgb16_png(WIDE),
    "TIFF": encoded(Image.fromarray(WIDE), "TIFF"),
    "TIFF, compressed": encoded(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"),
    "TIFF, big-endian": tiff(WIDE, 16, order=">"),
    "TIFF, white is zero": tiff(65535 - WIDE, 16, photometric=0),
    "TIFF, signed": tiff(WIDE.astype(int) - 32768, 16, sample_format=2),
    "TIFF, 12 bits": tiff(np.round(LEVELS / 255 * 4095).astype(int), 12),
    "PGM": pnm("P5 6 2 65535\n", WIDE),
    "PGM up to 4095": pnm("P5 6 2 4095\n", np.round(LEVELS / 255 * 4095)),
    "PGM up to 1000": pnm("P5 6 2 1000\n", np.round(LEVELS / 255 * 1000)),
    "plain PGM": ("P2 6 2 65535\n" + " ".join(map(str, WIDE.ravel().tolist()))).encode(),
    "PPM": pnm("P6 6 2 65535\n", np.repeat(WIDE[:, :, None], 3, axis=2)),
    "JPEG 2000": encoded(Image.fromarray(WIDE), "JPEG2000", irreversible=False),
    "array": WIDE,
    "tensor, channels first": torch.from_numpy(WIDE)[None].expand(3, -1, -1),
    "array of one channel": WIDE[:, :, None],
    "Pillow's I;16": Image.fromarray(WIDE),
    "Pillow's I;16B": Image.frombytes("I;16B", (6, 2), WIDE.astype(">u2").tobytes()),
}


@pytest.mark.parametrize("case", list(SIXTEEN_BITS))
def test_sixteen_bits_are_scaled_by_the_range_of_their_format(case):
    levels = grey_levels(SIXTEEN_BITS[case])
    assert np.abs(np.array(levels) - LEVELS[0].astype(int)).max() <= 1, levels


def test_the_transparent_level_of_sixteen_bits_is_white():
    content = encoded(Image.fromarray(WIDE), "PNG", transparency=int(WIDE[0, 2]))
    assert grey_levels(content) == [0, 3, 255, 100, 128, 9]


# ---- the forms in memory ----

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 9]], [[0, 0, 255], [10, 20, 30], [0, 0, 0]]], dtype=np.uint8)
FORMATS = ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "JPEG", "ICO", "TGA"]
OPTIONS = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}, "ICO": {"sizes": [(32, 32)]}}
BUFFERS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "every second byte of a memoryview": lambda content: memoryview(bytes(np.repeat(bytearray(content), 2)))[::2],
    "numpy uint8": lambda content: np.frombuffer(content, np.uint8),
    "numpy int8": lambda content: np.frombuffer(content, np.int8),
    "numpy S1": lambda content: np.frombuffer(content, "S1"),
    "numpy void": np.void,
    "numpy bytes": np.bytes_,
    "numpy object": lambda content: np.array(content, dtype=object),
    "torch uint8": lambda content: torch.frombuffer(bytearray(content), dtype=torch.uint8),
    "Arrow buffer": pa.py_buffer,
    "Arrow scalar": pa.scalar,
    "Arrow array": lambda content: pa.array(list(content), pa.uint8()),
    "BytesIO": io.BytesIO,
    "BytesIO that was read": lambda content: (buffer := io.BytesIO(content), buffer.read())[0],
    "array.array": lambda content: array.array("B", content),
    "in a dict": lambda content: {"bytes": np.frombuffer(content, np.uint8), "path": None},
}
OF_INTEGERS = {
    "list": list,
    "tuple": tuple,
    "numpy int64 with signs": lambda content: np.frombuffer(content, np.int8).astype(np.int64),
    "numpy int64": lambda content: np.array(list(content)),
    "numpy row": lambda content: np.frombuffer(content, np.uint8)[None],
    "Arrow scalar of a list": lambda content: pa.scalar(list(content), pa.list_(pa.uint8())),
    "torch int64": lambda content: torch.tensor(list(content)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_buffer_of_an_encoded_picture_is_decoded(kind):
    image = Image.fromarray(COLOURS).resize((40, 34), Image.Resampling.NEAREST)
    content = encoded(image, kind, **OPTIONS.get(kind, {}))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert kind == "ICO" or expected.shape == (34, 40, 3)
    forms = BUFFERS if kind == "TGA" else BUFFERS | OF_INTEGERS  # a TGA does not begin with a mark
    for name, form in forms.items():
        if kind != "ICO" or name not in OF_INTEGERS:
            found = np.asarray(decode_image(form(content)))
            assert np.array_equal(found, expected), name
            if name not in ("numpy bytes", "in a dict"):
                assert image_content(form(content)) == content, name
    for name, form in (OF_INTEGERS if kind not in ("TGA", "ICO") else {}).items():
        assert not is_feature_vector(form(content)), name


def test_pixels_of_any_array_are_a_picture():
    wide = np.concatenate([COLOURS, COLOURS[:, ::-1]], axis=1)
    floats, grey = wide / 255, wide[:, :, 1]
    arrow = np.empty(2, dtype=object)
    arrow[:] = [np.array([*map(np.array, row), None], dtype=object)[:-1] for row in wide]
    for value in (
        wide,
        wide.astype(np.int64),
        wide.tolist(),
        wide.transpose(2, 0, 1),
        floats,
        floats.astype(np.float16),
        torch.from_numpy(wide),
        torch.from_numpy(wide).permute(2, 0, 1),
        torch.from_numpy(floats).permute(2, 0, 1).to(torch.float32).requires_grad_(),
        np.dstack([wide, np.full((2, 6), 255, np.uint8)]),
        arrow,
    ):
        assert pixels(value) == wide.tolist()
    for value in (grey, grey[:, :, None], grey[None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert pixels(value) == np.repeat(grey[:, :, None], 3, axis=2).tolist()
    assert pixels(grey > 100) == np.repeat((grey > 100)[:, :, None] * 255, 3, axis=2).tolist()
    assert np.abs(np.array(pixels(torch.from_numpy(floats).to(torch.bfloat16))) - wide).max() <= 1


def test_a_small_tensor_has_its_channels_first_and_an_array_last():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert pixels(cube) == cube.tolist()
    assert pixels(torch.from_numpy(cube)) == cube.transpose(1, 2, 0).tolist()


# ---- side data ----


def with_png_chunk(content: bytes, kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """Insert a chunk after the header."""
    check = zlib.crc32(kind + data) if checksum is None else checksum
    return content[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check) + content[33:]


def with_jpeg_segment(content: bytes, marker: int, data: bytes) -> bytes:
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]


PNG = encoded(Image.fromarray(COLOURS), "PNG")
JPEG = encoded(Image.fromarray(np.repeat(np.repeat(COLOURS, 8, 0), 8, 1)), "JPEG", quality=95)
LONG = zlib.compress(bytes(3_000_000))
PNG_SIDE_DATA = {
    "long compressed text": with_png_chunk(PNG, b"zTXt", b"note\0\0" + LONG),
    "long international text": with_png_chunk(PNG, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "long profile": with_png_chunk(PNG, b"iCCP", b"icc\0\0" + LONG),
    "profile of unknown compression": with_png_chunk(PNG, b"iCCP", b"icc\0\7" + b"x" * 30),
    "damaged profile": with_png_chunk(PNG, b"iCCP", b"icc\0\0" + b"x" * 30),
    "text of a wrong checksum": with_png_chunk(PNG, b"tEXt", b"note\0hello", checksum=1),
    "text of unknown compression": with_png_chunk(PNG, b"zTXt", b"note\0\7" + b"x" * 30),
    "short chunks": with_png_chunk(with_png_chunk(PNG, b"gAMA", b""), b"pHYs", b"\1"),
    "text at the end": PNG[:-12] + with_png_chunk(bytes(33), b"zTXt", b"a\0\0" + LONG)[33:] + PNG[-12:],
}
JPEG_SIDE_DATA = {
    "damaged profile": with_jpeg_segment(JPEG, 0xE2, b"ICC_PROFILE\0\1\3" + b"x" * 50),
    "damaged tags": with_jpeg_segment(JPEG, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "several pictures that are not there": with_jpeg_segment(JPEG, 0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + b"\xff" * 9),
    "much metadata": with_jpeg_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x>" * 20_000),
    "damaged Photoshop data": with_jpeg_segment(JPEG, 0xED, b"Photoshop 3.0\0" + b"8BIM" * 5 + b"\xff" * 9),
}


def many_texts() -> bytes:
    """A PNG of more text than Pillow holds, each part of which is short."""
    text = bytes(1_000_000)
    part = with_png_chunk(bytes(33), b"zTXt", b"note\0\0" + zlib.compress(text))[33:]
    return PNG[:33] + part * 80 + PNG[33:]


@pytest.mark.filterwarnings("ignore")
def test_side_data_do_not_cost_the_picture(tmp_path):
    for name, content in {**PNG_SIDE_DATA, "many texts": many_texts()}.items():
        assert pixels(content) == COLOURS.tolist(), name
        (tmp_path / "a.png").write_bytes(content)
        assert pixels({"bytes": None, "path": str(tmp_path / "a.png")}) == COLOURS.tolist(), name
    for name, content in JPEG_SIDE_DATA.items():
        assert pixels(content) == pixels(JPEG), name


def test_the_orientation_is_kept_when_damaged_text_is_left_out():
    tags = Image.Exif()
    tags[0x0112] = 6
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=tags)
    damaged = with_png_chunk(content, b"zTXt", b"note\0\0" + LONG)
    assert pixels(damaged) == np.rot90(COLOURS, k=-1).tolist()


# ---- damage ----


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_gives_a_picture_or_the_reason(kind):
    assert features.check("jpg_2000") and features.check("webp")
    generator = np.random.default_rng(7)
    image = Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    content = encoded(image, kind, **OPTIONS.get(kind, {}))
    usable = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(content)
            for place in generator.integers(0, len(damaged), generator.integers(1, 12)):
                damaged[place] = generator.integers(0, 256)
            if generator.random() < 0.3:
                del damaged[int(generator.integers(0, len(damaged))) :]
            try:
                usable += decode_image({"bytes": bytes(damaged), "path": "a"}).mode == "RGB"
            except UnusableImage as error:
                assert error.problem and str(error).endswith(": a") or error.problem == "no such file"


# ---- what cannot be used, and why ----


def huge_header() -> bytes:
    # A PNG that claims 60,000 x 60,000 pixels.
    content = encoded(Image.new("L", (1, 1)), "PNG")
    side = (60_000).to_bytes(4, "big")
    header = b"IHDR" + side + side + content[24:29]
    return content[:12] + header + PngImagePlugin._crc32(header).to_bytes(4, "big") + content[33:]


def closed(file: io.BytesIO) -> io.BytesIO:
    file.close()
    return file


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
    "normalised floats": np.linspace(-2, 2, 48, dtype=np.float32).reshape(4, 4, 3),
    "floats up to 255": np.full((4, 4, 3), 255.0),
    "not a number": np.full((4, 4), np.nan),
    "out of range": np.full((4, 4, 3), 300),
    "negative": np.full((4, 4), -1),
    "seven channels": np.zeros((8, 8, 7), dtype=np.uint8),
    "a batch of pictures": np.zeros((2, 8, 8, 3), dtype=np.uint8),
    "feature vector": np.linspace(0, 1, 512, dtype=np.float32),
    "feature vector of integers": np.arange(100),
    "list of floats": [0.1, 0.2, 0.3],
    "feature vector in a row": np.zeros((1, 512), dtype=np.float32),
    "feature vector in a column": np.zeros((512, 1), dtype=np.uint8),
    "one pixel wide": np.zeros((100, 1, 3), dtype=np.uint8),
    "bytes of no picture in an array": np.frombuffer(b"<html>404 not found</html>", np.uint8),
    "tensor of a vector": torch.zeros(64),
    "strings": np.array([["a", "b"], ["c", "d"]]),
    "complex": np.zeros((4, 4), dtype=complex),
    "base64": base64.b64encode(bytes(range(200))).decode(),
    "base64 as bytes": {"bytes": "data:image/png;base64,iVBORw0KGgo=", "path": None},
    "address": "https://example.org/a.jpg",
    "folder": "/",
    "surrogate in the path": "/nowhere/\ud800.jpg",
    "null in the path": "a\0b.jpg",
    "text buffer": io.StringIO("text"),
    "closed buffer": closed(io.BytesIO(b"x")),
    "picture without pixels": Image.new("RGB", (0, 0)),
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


def reason(value) -> str:
    with warnings.catch_warnings(), pytest.raises(UnusableImage) as caught:
        warnings.simplefilter("ignore")
        decode_image(value)
    return str(caught.value)


def test_the_reason_names_cause_and_path(tmp_path):
    assert reason("/data/x.jpg") == "no such file: /data/x.jpg"
    assert reason({"bytes": None, "path": "/data/x.jpg"}) == "no such file: /data/x.jpg"
    assert reason(str(tmp_path)) == f"a folder, not a file: {tmp_path}"
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == f"the file is empty: {tmp_path}/empty.png"
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    assert reason(tmp_path / "page.jpg") == (
        f"UnidentifiedImageError: not a picture, the file holds b'<html>404</html>': {tmp_path}/page.jpg"
    )
    assert reason({"bytes": bytes(500), "path": "k.jpg"}).endswith("the file holds zeros alone: k.jpg")
    noise = Image.effect_noise((64, 64), 90)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
        content = encoded(noise.convert("RGB"), kind)
        assert "truncated" in reason({"bytes": content[: len(content) // 2], "path": f"cut.{kind}"}), kind
    assert "DecompressionBombError" in reason({"bytes": huge_header(), "path": "bomb.png"})
    assert reason(None) == reason(b"") == reason({"bytes": None, "path": None}) == "no image"
    assert "base64.b64decode" in reason(BAD_IMAGES["base64"]) and len(reason(BAD_IMAGES["base64"])) < 200
    assert "base64.b64decode" in reason(BAD_IMAGES["base64 as bytes"])
    assert reason("https://x.org/a.jpg") == "an address, not a file; download it first: https://x.org/a.jpg"
    assert "from 0 to 1, not normalised" in reason(BAD_IMAGES["normalised floats"])
    assert "shape (512,) is not a picture" in reason(np.zeros(512, np.float32))


def test_bytes_of_a_picture_are_not_a_feature_vector_and_numbers_are():
    for value in (np.arange(100), [1, 2, 3, 4, 5, 6, 7, 8, 9], np.zeros(512, np.uint8), [0.5] * 20, torch.zeros(5)):
        assert is_feature_vector(value)
    # Two letters do not make a bitmap.
    assert is_feature_vector([66, 77, *range(60)]) and is_feature_vector([255, 216, *range(60)])


# ---- JPEGs at a fraction of their size ----


def jpeg(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return encoded(coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)


@pytest.mark.parametrize(
    ("size", "smallest_side", "decoded"),
    [
        ((512, 256), None, (512, 256)),
        ((512, 256), 257, (512, 256)),
        ((512, 256), 129, (512, 256)),
        ((512, 256), 128, (256, 128)),
        ((512, 256), 64, (128, 64)),
        ((512, 256), 10, (64, 32)),  # an eighth at least
        ((301, 203), 100, (151, 102)),
        ((8, 8), 100, (8, 8)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_at_a_fraction(size, smallest_side, decoded, mode):
    content = jpeg(*size, mode)
    image = decode_image(as_row(content), smallest_side)
    assert image.size == decoded and image.mode == "RGB"
    whole = decode_image(as_row(content))
    assert whole.size == size
    if decoded == size:
        assert image.tobytes() == whole.tobytes()
    expected = np.asarray(whole.resize(decoded, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - expected).mean() < 6


def test_a_fraction_is_turned_upright_and_other_formats_are_whole(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "a.jpg").write_bytes(jpeg(400, 200, exif=exif))
    assert decode_image(str(tmp_path / "a.jpg"), 100).size == (100, 200)
    picture = Image.new("RGB", (400, 200), "red")
    for value in (picture, encoded(picture, "PNG"), encoded(picture, "WEBP"), np.asarray(picture)):
        assert decode_image(value, 10).size == (400, 200)
    with pytest.raises(UnusableImage):
        decode_image(as_row(jpeg(400, 200)[:300]), 50)
