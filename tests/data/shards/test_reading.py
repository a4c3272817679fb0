"""Rows of shards: columns, captions and names as people have them, and a message where there is no row to make."""

import json
import tarfile

import numpy as np
import pytest
from datasets import List, Value
from testing.tar_files import write_tar

from hf_dissect.auditing.export import export_clean
from hf_dissect.data import load_splits
from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.shards.files import find_shards
from hf_dissect.data.surrogates import MARK

PICTURE = b"\x89PNG picture"


def load(path, **settings):
    return load_splits(source="webdataset", path=str(path), **settings)["train"]


def write_records(path, *records):
    members = {}
    for row, record in enumerate(records):
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        members |= {f"{row:03}.jpg": PICTURE, f"{row:03}.json": text}
    write_tar(path, members)


def column(rows, name):
    return [row[name] for row in rows]


both_ways = pytest.mark.parametrize("streaming", [False, True])


# ---- columns ----


@both_ways
def test_the_first_samples_do_not_decide_for_all(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", {})  # as webdataset's own writer leaves it
    write_tar(tmp_path / "1.tar", {f"{row}.txt": b"no picture" for row in range(20)})
    write_records(tmp_path / "2.tar", {"caption": "a"}, {"caption": "b", "late": 1})
    rows = load(tmp_path, streaming=streaming)
    assert column(rows, "caption") == ["no picture"] * 20 + ["a", "b"]
    assert [row["image"] is None for row in rows] == [True] * 20 + [False] * 2
    if not streaming:
        assert column(rows, "late") == [None] * 21 + [1]


def test_columns_are_as_wide_as_their_values(tmp_path):
    values = {
        "similarity": [0, 0.31, 2],
        "mixed": [1, "text", None],
        "missing": [None, None, True],
        "wide": [2**60, 1, 2],
        "beyond": [2**70, 1, 0.5],
        "exact": [2**60, 0.5, 1],
        "sometimes": [[1], "b", 2],
        "always": [[1], {}, [2]],
        "null": [None, None, None],
        "half": ["\ud83d", "b", "c"],
    }
    records = [{"caption": "c", **{name: given[row] for name, given in values.items()}} for row in range(3)]
    write_records(tmp_path / "0.tar", *records[:1])
    write_records(tmp_path / "1.tar", *records[1:])
    rows = load(tmp_path)
    kinds = {name: kind.dtype for name, kind in rows.features.items() if name in values}
    assert kinds == {
        "similarity": "float64", "mixed": "string", "missing": "bool", "wide": "int64", "beyond": "string",
        "exact": "string", "sometimes": "string", "half": "string",
    }  # fmt: skip
    assert rows["similarity"] == [0.0, 0.31, 2.0] and rows["mixed"] == ["1", "text", None]
    assert rows["wide"] == [2**60, 1, 2] and rows["exact"] == [str(2**60), "0.5", "1"]
    assert rows["beyond"] == [str(2**70), "1", "0.5"] and rows["sometimes"] == ["[1]", "b", "2"]
    assert rows["half"] == ["\\ud83d", "b", "c"]


def test_a_stream_has_what_is_asked_for_and_the_rest_as_text(tmp_path):
    records = [{"caption": str(row), "uid": f"u{row}", "task": row % 2, "clean": True} for row in range(3)]
    extra = [0, 0.31, "text"]
    write_records(tmp_path / "0.tar", *({**record, "x": x} for record, x in zip(records, extra, strict=True)))
    rows = load(tmp_path, streaming=True, id_column="uid", task_column="task")
    assert list(rows.features) == ["image", "caption", "__key__", "uid", "task", "clean", "__json__"]
    assert [json.loads(row["__json__"])["x"] for row in rows] == extra
    pairs = list(as_pairs(rows, sample_id="uid", task="task"))
    assert [pair["task_id"] for pair in pairs] == [0, 1, 0] and all(pair["is_clean"] for pair in pairs)


def test_a_stream_has_labels_of_the_usual_names(tmp_path):
    write_records(tmp_path / "0.tar", {"label": 1, "caption": "a", "x": 2}, {"label": 0})
    write_records(tmp_path / "1.tar", {"label": "text"})
    rows = load(tmp_path, streaming=True)
    assert list(rows.features) == ["image", "caption", "__key__", "label", "__json__"]
    assert column(rows, "label") == [1, 0, None] and json.loads(list(rows)[2]["__json__"]) == {"label": "text"}


def test_fields_that_are_asked_for_are_named_with_shard_and_key(tmp_path):
    write_records(tmp_path / "0.tar", {"caption": "a", "uid": 1}, {"caption": "b", "uid": 2}, {"caption": "c"})
    write_records(tmp_path / "1.tar", {"caption": "a", "uid": "text"})
    with pytest.raises(ValueError, match=r"Sample '002' of '.*/0\.tar' has no value 'uid'.*name another column"):
        load(tmp_path, id_column="uid")
    for path, message in {
        "0.tar": r"Sample '002' of '.*/0\.tar' has no value 'uid'; it has the members jpg, json, and in the JSON cap",
        "{0,1}.tar": "has no value",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(load(tmp_path / path, streaming=True, id_column="uid"))
    write_records(tmp_path / "0.tar", {"caption": "a", "uid": 1})
    with pytest.raises(ValueError, match=r"Field 'uid' of sample '000' of '.*/1\.tar' is 'text', but .* have int64"):
        list(load(tmp_path, streaming=True, id_column="uid"))
    assert load(tmp_path, id_column="uid")["uid"] == ["1", "text"]
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"no values in 'nothing', which a setting names; .* in the JSON caption, u"
        ):
            load(tmp_path, streaming=streaming, task_column="nothing")


# ---- captions ----


@both_ways
def test_the_first_caption_that_is_not_empty_is_taken(tmp_path, streaming, caplog):
    files = {
        "0.jpg": PICTURE, "0.txt": b" \n", "0.json": b'{"caption": "from the JSON"}',
        "1.jpg": PICTURE, "1.txt": b"\0\0\0", "1.caption": b"from the caption",
        "2.jpg": PICTURE, "2.txt": b"\xef\xbb\xbfbom", "2.json": b'{"caption": "other"}',
        "3.jpg": PICTURE, "3.txt": b"", "3.json": b'{"captions": [], "text": "", "caption": "last"}',
        "4.jpg": PICTURE, "4.json": b'{"caption": "\\ud83d"}',
        "5.jpg": PICTURE, "5.json": b'{"text": "\\ud83d", "caption": "whole"}',
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    rows = load(tmp_path, streaming=streaming)
    assert column(rows, "caption") == ["from the JSON", "from the caption", "bom", "last", MARK + "\\ud83d", "whole"]
    assert "list of captions" not in caplog.text


@both_ways
def test_the_caption_can_be_chosen(tmp_path, streaming, caplog):
    record = {"captions": ["a", "b"], "blip": "described"}
    members = {"jpg": PICTURE, "txt": b"text", "json": json.dumps(record).encode(), "en.txt": b"english"}
    write_tar(tmp_path / "0.tar", {f"{row}.{name}": content for row in range(2) for name, content in members.items()})
    assert column(load(tmp_path, streaming=streaming), "caption") == ["text"] * 2
    assert "2 samples have a text member and a list of captions" in caplog.text or streaming
    for name, expected in {"txt": "text", "blip": "described", "en.txt": "english", "captions": ["a", "b"]}.items():
        rows = load(tmp_path, streaming=streaming, caption_column=name)
        assert column(rows, name) == [expected] * 2
        pairs = as_pairs(rows, caption=name)
        captions = expected if isinstance(expected, list) else [expected]
        assert [pair["caption"] for pair in pairs] == captions * 2
    assert column(load(tmp_path, streaming=streaming, caption_column="caption"), "caption") == ["text"] * 2
    with pytest.raises(
        ValueError, match=r"data\.caption_column 'german': .* the members en\.txt, .*in the JSON blip, c"
    ):
        load(tmp_path, streaming=streaming, caption_column="german")


def test_lists_that_come_later(tmp_path):
    write_records(tmp_path / "0.tar", *[{"caption": "one"}] * 20, {"captions": ["a", "", "b"]})
    rows = load(tmp_path)
    assert rows.features["captions"] == List(Value("string"))
    assert rows["captions"] == [["one"]] * 20 + [["a", "", "b"]]
    with pytest.raises(
        ValueError, match=r"Sample '020' of '.*0\.tar' has a list of 3 captions.*data\.caption_column to c"
    ):
        list(load(tmp_path, streaming=True))
    assert column(load(tmp_path, streaming=True, caption_column="captions"), "captions") == rows["captions"]


@both_ways
def test_the_picture_can_be_chosen(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", {"0.rgb.png": b"rgb", "0.depth.png": b"depth", "0.jpg": b"", "0.txt": b"a"})
    (row,) = load(tmp_path, streaming=streaming, image_column="depth.png")
    assert row["depth.png"]["bytes"] == b"depth" and row["caption"] == "a"
    with pytest.raises(
        ValueError, match=r"no picture 'left\.png', which data\.image_column names, only the members d"
    ):
        load(tmp_path, streaming=streaming, image_column="left.png")


# ---- names and forms ----


@both_ways
def test_names_with_dots_are_read_if_their_pairs_need_it(tmp_path, streaming, caplog):
    names = ["IMG.2020.01", "IMG.2020.02", "x/a.b", "plain"]
    write_tar(tmp_path / "0.tar", {f"{n}.{e}": n.encode() for n in names for e in ("JPG", "txt")})
    rows = load(tmp_path, streaming=streaming)
    assert [(row["__key__"], row["image"]["bytes"].decode(), row["caption"]) for row in rows] == [
        (n,) * 3 for n in names
    ]
    assert "split at their last dot" in caplog.text
    caplog.clear()
    write_tar(
        tmp_path / "0.tar", {"0.jpg": PICTURE, "0.seg.png": b"s", "0.txt": b"a", "1.jpg": PICTURE, "1.txt": b"b"}
    )
    assert column(load(tmp_path, streaming=streaming), "__key__") == ["0", "1"] and not caplog.text


@both_ways
@pytest.mark.parametrize(
    "names",
    [
        [f"{row}.{e}" for e in ("jpg", "txt") for row in range(50)],
        [f"images/{row}.jpg" for row in range(3)] + [f"texts/{row}.txt" for row in range(3)],
        [f"{row}/{name}" for row in range(3) for name in ("image.jpg", "caption.txt")],
    ],
)
def test_pictures_and_captions_that_never_meet(tmp_path, streaming, names):
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, b"x"))
    count = len(names) // 2
    with pytest.raises(
        ValueError, match=rf"never meet\. {count} samples have a picture, .*{count} have a caption.*sort"
    ):
        load(tmp_path, streaming=streaming)


@both_ways
def test_a_sample_in_two_places_is_named(tmp_path, streaming):
    """`tar` writes the files of a folder in any order unless it is asked to sort them."""
    pairs = [f"{row}.{e}" for row in range(30) for e in ("jpg", "txt")]
    for names in (["x.txt", *pairs, "x.jpg"], [*pairs, "x.jpg", "y.jpg", "y.txt", "x.txt"]):
        write_tar(tmp_path / "0.tar", dict.fromkeys(names, b"x"))
        with pytest.raises(ValueError, match=r"Sample 'x' of '.*0\.tar' lies in two places.*tar --sort=name"):
            list(load(tmp_path, streaming=streaming))
    lonely = dict.fromkeys([*pairs, "x.jpg", "y.jpg", "y.txt", "z.txt"], b"x")
    write_tar(tmp_path / "0.tar", lonely)
    assert sum(row["image"] is None or row["caption"] is None for row in load(tmp_path, streaming=streaming)) == 2


@both_ways
def test_only_classes(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", {"0.jpg": PICTURE, "0.cls": b"3\n", "1.jpg": PICTURE, "1.cls": b"12"})
    rows = load(tmp_path, streaming=streaming)
    assert column(rows, "cls") == [3, 12]
    with pytest.raises(
        ValueError, match=r"No column named caption or text .* has image, __key__, cls\. Name yours with"
    ):
        as_pairs(rows)
    assert column(load(tmp_path, streaming=streaming, caption_column="cls"), "cls") == ["3", "12"]


def test_links_are_named(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        entry = tarfile.TarInfo("0.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/pictures/0.jpg"
        archive.addfile(entry)
    with pytest.raises(ValueError, match=r"holds no samples.* 1 members are links: write the shards with tar --deref"):
        load(tmp_path)


def test_compressed_shards_of_a_folder(tmp_path, caplog):
    for name, mode in {
        "a.tar": "w",
        "a.tar.gz": "w:gz",
        "b.tgz": "w:gz",
        "c.tar.bz2": "w:bz2",
        "d.tar.xz": "w:xz",
    }.items():
        write_tar(tmp_path / "plain.tar", {f"{name[0]}.jpg": PICTURE, f"{name[0]}.txt": name[0].encode()})
        with tarfile.open(tmp_path / name, mode) as archive, tarfile.open(tmp_path / "plain.tar") as plain:
            for member in plain:
                archive.addfile(member, plain.extractfile(member))
    (tmp_path / "plain.tar").unlink()
    (tmp_path / "._a.tar").write_bytes(b"left by macOS")
    assert load(tmp_path)["caption"] == ["a", "b", "c", "d"]
    assert "the same shard is there in another form: a.tar.gz" in caplog.text
    assert column(load(tmp_path / "*.tgz", streaming=True), "caption") == ["b"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar file, plain or compressed \(\.tar, \.tar\.gz"):
        find_shards(str(tmp_path / "none"), {"train": "train"})


def test_a_member_that_repeats(tmp_path):
    parts = [
        ("x.jpg", b"1"),
        ("x.txt", b"one"),
        ("x.jpg", b"2"),
        ("x.txt", b"two"),
        ("y.jpg", b"3"),
        ("y.txt", b"three"),
    ]

    def write(parts):
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for name, content in parts:
                write_tar(tmp_path / "part" / "p.tar_", {name: content})
                with tarfile.open(tmp_path / "part" / "p.tar_") as part:
                    archive.addfile(part.next(), part.extractfile(name))

    write(parts)
    rows = load(tmp_path)
    assert [(row["image"]["bytes"], row["caption"]) for row in rows] == [(b"1", "one"), (b"2", "two"), (b"3", "three")]
    write([*parts, ("y.txt", b"four")])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"'.*/0\.tar' is not .*the key 'y' has more than one member 'txt'"):
            list(load(tmp_path, streaming=streaming))


@both_ways
def test_a_truth_that_nobody_asked_for_does_not_stop_a_run(tmp_path, streaming, caplog):
    write_records(
        tmp_path / "0.tar", {"caption": "a", "clean": True}, {"caption": "b"}, {"caption": "c", "is_clean": "x"}
    )
    rows = load(tmp_path, streaming=streaming)
    assert [pair["caption"] for pair in as_pairs(rows)] == ["a", "b", "c"] and (
        streaming or "'clean' is left out" in caplog.text
    )
    with pytest.raises(ValueError, match=r"Sample '001' of '.*0\.tar' has no value 'clean'"):
        list(load(tmp_path, streaming=streaming, clean_column="clean"))


def test_an_export_has_the_values_of_the_shards(tmp_path):
    write_records(tmp_path / "0.tar", *({"caption": str(row), "similarity": [0, 0.31][row % 2]} for row in range(12)))
    rows = load(tmp_path)
    export_clean(tmp_path / "clean", rows, as_pairs(rows), np.arange(12) != 4)
    exported = load_splits(source="folder", path=str(tmp_path / "clean"))["train"]
    assert exported["similarity"] == [[0, 0.31][row % 2] for row in range(12) if row != 4]
