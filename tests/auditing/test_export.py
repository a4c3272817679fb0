"""The filtered data set: which pairs it has, and that nothing else of it changed."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dissect import make_scenes
from hf_dissect.auditing import export as export_module
from hf_dissect.auditing.export import export_clean
from hf_dissect.data import as_pairs, load_splits


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def loaded(folder, split="train") -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split=split)


def test_rows_with_one_caption_are_kept_whole(tmp_path):
    rows = make_scenes(20).add_column("source", [f"s{place}" for place in range(20)])
    keep = np.arange(20) % 3 != 0
    done = export_clean(tmp_path / "clean", rows, as_pairs(rows), keep)
    assert (done.pairs_before, done.pairs_after, done.rows_after) == (20, 13, 13)
    assert [path.name for path in (tmp_path / "clean").iterdir()] == ["train-00000-of-00001.parquet"]
    found = loaded(tmp_path / "clean")
    assert found.column_names == rows.column_names and isinstance(found.features["image"], datasets.Image)
    undecoded = found.cast_column("image", datasets.Image(decode=False))
    expected = rows.select(np.flatnonzero(keep))
    assert [image["bytes"] for image in undecoded["image"]] == [image["bytes"] for image in expected["image"]]
    assert list(found["source"]) == list(expected["source"]) and list(found["caption"]) == list(expected["caption"])


def test_of_several_captions_the_bad_ones_go_and_with_the_last_the_row(tmp_path):
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture(shade), "path": None} for shade in range(4)],
            "captions": [["a0", "a1", "a2"], ["b0"], [], ["d0", "d1"]],
            "clean": [[True, False, True], [False], [], [False, True]],
            "tags": [["x", "y", "z"], ["x"], [], ["u", "v"]],  # of the row, not of its captions
        }
    ).cast_column("image", datasets.Image(decode=False))
    pairs = as_pairs(rows)
    assert len(pairs) == 7  # the row without captions is one unreadable pair
    keep = np.array([True, False, True, False, False, False, True])
    done = export_clean(tmp_path / "clean", rows, pairs, keep, split="dev")
    assert (done.pairs_after, done.rows_before, done.rows_after) == (3, 4, 2)
    found = datasets.Dataset.from_parquet(str(tmp_path / "clean" / "dev-00000-of-00001.parquet"))
    assert found["captions"][:] == [["a0", "a2"], ["d1"]] and found["clean"][:] == [[True, True], [True]]
    assert found["tags"][:] == [["x", "y", "z"], ["u", "v"]]


def test_pictures_in_files_are_put_into_the_shards_and_these_are_read_by_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(export_module, "SHARD_BYTES", 1)
    (tmp_path / "data").mkdir()
    for shade in range(7):
        (tmp_path / "data" / f"{shade}.png").write_bytes(picture(shade))
    table = datasets.Dataset.from_dict({"image_path": [f"{i}.png" for i in range(7)], "text": list("abcdefg")})
    table.to_csv(tmp_path / "data" / "train.csv")
    rows = load_splits(source="folder", path=str(tmp_path / "data"))["train"]
    export_clean(tmp_path / "clean", rows, as_pairs(rows), np.arange(7) != 2)
    assert len(list((tmp_path / "clean").iterdir())) == 2
    again = load_splits(source="folder", path=str(tmp_path / "clean"))["train"]
    assert list(again["text"]) == list("abdefg")
    assert [image["bytes"] for image in again["image_path"]] == [picture(shade) for shade in (0, 1, 3, 4, 5, 6)]


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, monkeypatch):
    rows = make_scenes(4)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    with pytest.raises(ValueError, match="there is not empty; name a new folder"):
        export_clean(tmp_path / "there", rows, as_pairs(rows), np.ones(4, bool))
    with pytest.raises(ValueError, match="would keep no pair"):
        export_clean(tmp_path / "new", rows, as_pairs(rows), np.zeros(4, bool))
    broken = rows.cast_column("image", datasets.Image(decode=False)).map(
        lambda row, place: {"image": {"bytes": None, "path": "/nowhere.png"} if place == 3 else row["image"]},
        with_indices=True,
    )
    with pytest.raises(FileNotFoundError):
        export_clean(tmp_path / "new", broken, as_pairs(broken), np.ones(4, bool))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
