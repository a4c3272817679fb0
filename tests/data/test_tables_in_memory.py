"""Rows that people hold in memory make a table, whatever form their pictures have."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from testing import tiny_models

from hf_dissect import SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.images import decode_image
from hf_dissect.data.problems import read_problems
from hf_dissect.data.surrogates import MARK, is_unencodable

PICTURE = tiny_models.tiny_picture(3)[0]
PIXELS = np.asarray(PICTURE)


def png(image: Image.Image = PICTURE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


FORMS = {
    "bytes": png(),
    "bytearray": bytearray(png()),
    "memoryview": memoryview(png()),
    "BytesIO": io.BytesIO(png()),
    "uint8": np.frombuffer(png(), np.uint8),
    "tensor": torch.frombuffer(bytearray(png()), dtype=torch.uint8),
    "void": np.void(png()),
    "Arrow buffer": pa.py_buffer(png()),
    "list of integers": list(png()),
    "picture": PICTURE,
    "array": PIXELS,
    "channels first": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "nested lists": PIXELS.tolist(),
    "dict": {"bytes": png(), "path": None},
    "dict of a buffer": {"bytes": bytearray(png()), "path": "3.png"},
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("frame", [False, True])
def test_every_form_of_a_picture_makes_pairs(form, frame):
    rows = [{"image": FORMS[form], "caption": text} for text in "ab"]
    pairs = as_pairs(pd.DataFrame(rows) if frame else rows)
    assert [pair["caption"] for pair in pairs] == ["a", "b"]
    assert np.array_equal(np.asarray(decode_image(pairs[1]["image"])), PIXELS)


def test_forms_may_be_mixed_with_paths_and_missing_ones(tmp_path):
    PICTURE.save(tmp_path / "3.png")
    forms = [
        png(),
        str(tmp_path / "3.png"),
        tmp_path / "3.png",
        PICTURE,
        Image.open(tmp_path / "3.png"),
        PIXELS[:20],
        bytearray(png()),
        {"bytes": None, "path": str(tmp_path / "3.png")},
        None,
        np.zeros((5, 5, 7)),
        "/nowhere.png",
    ]
    pairs = as_pairs([{"image": form, "caption": "red"} for form in forms])
    batch = SelectionCollator(tiny_models.tiny_clip()[1])(list(pairs))
    assert batch["bad_reason"].tolist() == [0] * 8 + [BadReason.IMAGE] * 3
    assert pairs[8]["image"] is None


def test_a_picture_that_was_changed_after_it_was_opened_is_the_changed_one(tmp_path):
    PICTURE.save(tmp_path / "3.png")
    opened = Image.open(tmp_path / "3.png")
    opened.paste((1, 2, 3), (0, 0, *opened.size))
    assert np.unique(decode_image(as_pairs([{"image": opened, "caption": "a"}])[0]["image"])).tolist() == [1, 2, 3]


def test_pictures_of_several_sizes_and_vectors_make_tables():
    pairs = as_pairs([{"image": np.zeros((8 + row, 9, 3), np.uint8), "caption": "a"} for row in range(3)])
    assert [decode_image(pair["image"]).size for pair in pairs] == [(9, 8), (9, 9), (9, 10)]
    pairs = as_pairs([{"image": np.arange(3, dtype=np.float32) + row, "caption": "a"} for row in range(3)])
    assert pairs[2]["image"].tolist() == [2, 3, 4]
    pairs = as_pairs([{"image": [0.5, row], "caption": "a"} for row in range(3)])
    assert pairs[2]["image"].tolist() == [0.5, 2]


# ---- data frames ----


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame({"image_path": ["a.jpg", "b.jpg", "c.jpg"], "caption": ["x", "y", "z"], **columns})


def test_a_data_frame_makes_pairs_without_its_index():
    data = frame(year=[1, 2, 3]).set_index("year").iloc[[2, 0]]
    pairs = as_pairs(data)
    assert [(pair["image"], pair["caption"], pair["sample_id"]) for pair in pairs] == [
        ("c.jpg", "z", 0),
        ("a.jpg", "x", 1),
    ]
    assert pairs.rows.column_names == ["image_path", "caption"]


def test_categories_dates_and_missing_values_of_pandas():
    data = frame(
        task=pd.Categorical(["art", "web", "art"]),
        date=pd.to_datetime(["2020-01-01"] * 3),
        size=[1.5, float("nan"), 2.0],
        clean=[True, False, True],
    )
    data.loc[1, "caption"] = None
    data.loc[2, "caption"] = float("nan")
    pairs = as_pairs(data, task="task")
    assert [pair["task_id"] for pair in pairs] == [0, 1, 0] and [pair["is_clean"] for pair in pairs] == [
        True,
        False,
        True,
    ]
    assert [pair["caption"] for pair in pairs] == ["x", None, None]
    objects = frame(caption=["x", float("nan"), "z"], picture=[PICTURE, None, float("nan")]).astype(
        {"caption": object}
    )
    pairs = as_pairs(objects, image="picture")
    assert [pair["caption"] for pair in pairs] == ["x", None, "z"] and pairs[2]["image"] is None


def test_several_captions_and_ids_of_a_data_frame():
    data = pd.DataFrame(
        {"image_path": ["a", "b"], "captions": [["x", "y"], ["z"]], "key": ["k1", "k2"]}, index=["r", "s"]
    )
    pairs = as_pairs(data, sample_id="key")
    assert [(pair["caption"], pair["key"]) for pair in pairs] == [("x", "k1"), ("y", "k1"), ("z", "k2")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame({"image": [], "caption": []}), "no rows"),
        (pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("c", "d")])), "need one name each"),
        (pd.DataFrame([[1, 2]], columns=["image", "image"]), "need one name each"),
        (pd.DataFrame({"image": ["a", "b"], "caption": ["x", 5]}), "DataFrame does not make a table"),
        (pd.DataFrame({0: ["a"], 1: ["b"]}), "No column named image .*the data has 0, 1"),
        (pa.table({"image": pa.array([], pa.string())}), "no rows"),
    ],
)
def test_a_table_that_makes_no_pairs_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        as_pairs(data)


def test_arrow_tables_with_views_and_dictionaries_make_pairs():
    table = pa.table(
        {
            "image_path": pa.array(["a.jpg", "b.jpg"], pa.string_view()),
            "caption": pa.array(["x", "y"]).dictionary_encode(),
            "jpg": pa.array([png(), png()], pa.binary_view()),
        }
    )
    pairs = as_pairs(table)
    assert [pair["caption"] for pair in pairs] == ["x", "y"]
    assert np.array_equal(np.asarray(decode_image(pairs[0]["image"])), PIXELS)


class Frame:
    """A data frame of polars as far as it is read here: it is not installed with the package."""

    __module__ = "polars.dataframe.frame"

    def __init__(self, table: pa.Table) -> None:
        self.to_arrow = lambda: table


def test_polars_is_read_by_way_of_arrow():
    table = pa.table({"image_path": pa.array(["a.jpg"], pa.large_string()), "text": pa.array(["x"], pa.string_view())})
    assert as_pairs(Frame(table))[0]["caption"] == "x"
    lazy = type("LazyFrame", (), {"__module__": "polars.lazyframe.frame"})()
    with pytest.raises(ValueError, match=r"LazyFrame of polars has no rows yet; pass its .collect\(\)"):
        as_pairs(lazy)


# ---- texts that cannot be encoded ----

HALF = "half a pair \ud83d"


@pytest.mark.parametrize("as_frame", [False, True])
def test_a_caption_that_cannot_be_encoded_is_a_bad_row_of_a_table(as_frame):
    rows = [{"image": png(), "caption": text, "url": "\udcff"} for text in ("red", HALF, "a red patch")]
    pairs = as_pairs(pd.DataFrame(rows, dtype=object) if as_frame else rows)
    assert [pair["caption"] for pair in pairs] == ["red", MARK + r"half a pair \ud83d", "a red patch"]
    batch = SelectionCollator(tiny_models.tiny_clip()[1])(list(pairs))
    assert batch["bad_reason"].tolist() == [0, BadReason.CAPTION_NOT_UNICODE, 0]
    assert list(pairs.captions()) == ["red", "a red patch"]  # for a tokenizer
    assert read_problems(batch) == {1: r"half a pair \ud83d"}


def test_one_of_several_captions_that_cannot_be_encoded_is_one_bad_row():
    rows = [{"image": png(), "captions": texts} for texts in (["a", HALF], ["b", "c", "d"])]
    pairs = as_pairs(rows)
    assert [is_unencodable(pair["caption"]) for pair in pairs] == [False, True, False, False, False]


def test_paths_of_pathlib_are_paths():
    assert as_pairs([{"image": Path("a/b.jpg"), "caption": "x"}])[0]["image"] == "a/b.jpg"
