"""What is stored of a run must be small, readable again, and never half written."""

import base64
import io

import pytest
from PIL import Image

from hf_dissect.report.data import RunSummary, replace_file, thumbnail


@pytest.mark.parametrize("content", ["", "[1]", '{"format_version": 99}', '{"format_version": 1}', "\x00"])
def test_load_names_the_file_it_cannot_read(tmp_path, content):
    path = tmp_path / "report_data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"report_data\.json.*RunSummary\.save"):
        RunSummary.load(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_thumbnails_of_every_mode_are_small_jpegs(mode):
    original = Image.new(mode, (640, 320))
    small = thumbnail(original)
    assert original.size == (640, 320) and original.mode == mode
    with Image.open(io.BytesIO(base64.b64decode(small))) as picture:
        assert picture.format == "JPEG" and picture.size == (160, 80)


def test_transparent_pixels_become_white_and_broken_pictures_none(tmp_path):
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(Image.new("RGBA", (9, 9), (255, 0, 0, 0)))))) as picture:
        assert picture.getpixel((4, 4)) == (255, 255, 255)
    Image.new("RGB", (300, 300)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:120])
    assert thumbnail(Image.open(tmp_path / "x.png")) is None and thumbnail(None) is None


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["report.html"]
