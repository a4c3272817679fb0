"""Tables in text files: separators, encodings, text that looks like something else, and rows that do not fit."""

import gzip
import json
import logging

import PIL.Image
import pytest
from datasets import Value
from testing import tiny_models

from hf_dissect import SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.loading import load_splits
from hf_dissect.data.problems import read_problems, split_problem
from hf_dissect.data.surrogates import MARK


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder, text, name="train.csv", encoding="utf-8"):
    content = text.encode(encoding)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def load(path, **given):
    return load_splits(source="folder", path=str(path), **given)


def read(folder, text, name="train.csv", encoding="utf-8", **given):
    return load(write(folder, text, name, encoding), **given)["train"]


# separators


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.csv.gz", "captions.txt"])
@pytest.mark.parametrize("given", [False, True])
def test_separator_is_recognised_or_given(tmp_path, separator, name, given):
    rows = [["image", "caption", "score"], ["a b.png", '"a cat, or; a\t|dog"', "0.5"], ["é.png", "NA", "2"]]
    text = "\n".join(map(separator.join, rows)) + "\n"
    train = read(tmp_path, text, name, separator=separator if given else None)
    assert train["caption"] == ["a cat, or; a\t|dog", "NA"] and train["score"] == [0.5, 2.0]
    assert [image["path"] for image in train["image"]] == [str(tmp_path / "a b.png"), str(tmp_path / "é.png")]


@pytest.mark.parametrize("written", ["tab", "\\t", "\t"])
def test_columns_of_open_clip_are_recognised(tmp_path, written):
    text = "filepath\ttitle\tid\nfoo/0.jpg\ta cat, sitting\t0\nfoo/1.jpg\tnull\t1\n"
    pairs = as_pairs(read(tmp_path, text, separator=written))
    assert pairs.columns.image == "filepath" and pairs.columns.caption == "title"
    assert pairs[1]["caption"] == "null" and pairs[1]["image"]["path"] == str(tmp_path / "foo/1.jpg")
    both = as_pairs(read(tmp_path, "image\tcaption\ttitle\n0.jpg\ta\tb\n", "train.tsv"))
    assert both.columns.image == "image" and both[0]["caption"] == "a"


def test_line_of_excel_names_the_separator(tmp_path):
    assert read(tmp_path, "sep=;\r\nimage;caption\r\n0.png;a, b\r\n")["caption"] == ["a, b"]


@pytest.mark.parametrize(
    ("text", "separator", "message"),
    [
        ("image;caption\n0.png;a\n", ",", r"train\.csv'.*\['image;caption'\].*data\.separator, probably to ';'"),
        ("image\tcaption\n0.png\ta\n", ";", r"data\.separator, probably to '\\t'"),
        ("image|x;caption\n0.png;a;b\n", None, r"header .* separated by ';' or '\|'\. Set data\.separator"),
        ("image\tcaption,x\n0.png\ta,b\n", None, r"data\.separator, probably to '\\t'"),
        ("image,caption\n0.png,a\n", ";;", r"data\.separator is ';;', but must be one character"),
        ("image,caption\n0.png,a\n", '"', r"data\.separator is '\"'"),
    ],
)
def test_wrong_separator_is_suspected(tmp_path, text, separator, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, separator=separator)


@pytest.mark.parametrize("source", ["hub", "webdataset", "scenes"])
@pytest.mark.parametrize("given", [{"separator": ";"}, {"encoding": "cp1252"}])
def test_settings_of_text_need_a_source_of_text(source, given):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(given))} is .*data\.source to folder or imagefolder"):
        load_splits(source=source, path=None if source == "scenes" else "somewhere", **given)


def test_separator_for_other_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.separator is ';', but train\.jsonl is not delimited text"):
        read(tmp_path, '{"caption": "a"}\n', "train.jsonl", separator=";")


# encodings


@pytest.mark.parametrize("name", ["train.csv", "train.tsv.gz", "train.jsonl", "train.json", "train.jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "setting"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-32", None),
        ("cp1252", "cp1252"),
        ("latin-1", "iso-8859-1"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16"),
        ("utf-8-sig", "cp1252"),  # its mark says better than the setting
    ],
)
def test_encodings(tmp_path, name, encoding, setting):
    rows = [{"image": f"{row}.png", "caption": caption} for row, caption in enumerate(["ein café", "naïve", "x"])]
    if "json" in name:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if "jsonl" in name else f"[{', '.join(lines)}]"
    else:
        mark = "\t" if "tsv" in name else ","
        text = f"image{mark}caption\r\n" + "".join(f"{row['image']}{mark}{row['caption']}\r\n" for row in rows)
    train = load(write(tmp_path, text, name, encoding), encoding=setting)["train"]
    assert train.column_names == ["image", "caption"] and train["caption"] == ["ein café", "naïve", "x"]


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.jsonl"])
def test_wrong_encoding_is_suspected_with_the_line(tmp_path, name):
    lines = ["image,caption", *["0.png,a cat"] * 3000, "1.png,café"]
    if name == "train.jsonl":
        lines = [*['{"image": "0.png", "caption": "a cat"}'] * 3001, '{"caption": "café"}']
    text = "\n".join(lines)
    with pytest.raises(ValueError, match=rf"{name}', line 3002: not .*utf-8 \(byte 0xe9 at .*data\.encoding.*cp1252"):
        read(tmp_path, text, name, "latin-1")


def test_zero_bytes_and_unknown_encodings(tmp_path):
    with pytest.raises(ValueError, match=r"holds zero bytes.*data\.encoding, probably to utf-16-le"):
        read(tmp_path, "image,caption\n0.png,a\n", encoding="utf-16-le")
    with pytest.raises(ValueError, match=r"data\.encoding None.*probably to utf-16-be"):
        read(tmp_path, "image,caption\n0.png,a\n", encoding="utf-16-be")
    for wrong in ("utf-9", "base64", ""):
        with pytest.raises(ValueError, match=rf"data\.encoding is '{wrong}', which is not a text encoding"):
            load(write(tmp_path, "image,caption\n0.png,a\n"), encoding=wrong)


def test_utf8_read_as_something_else_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path, "image,caption\n0.png,café\n"), encoding="latin-1")
    assert "is read as data.encoding latin-1, but is UTF-8 as well" in caplog.text


# types

STRANGE = ["NA", "null", "None", "nan", "007", "1e5", "True", "false", "-1", "N/A", "2009-01-01", "12", " 3 "]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.json"])
@pytest.mark.parametrize("column", ["caption", "text", "title", "what_is_seen"])
def test_captions_are_text_whatever_they_look_like(tmp_path, name, column):
    given = {"caption_column": column}
    for captions in (STRANGE, *[[caption] * 3 for caption in STRANGE]):
        rows = [{"image": f"{row}.png", column: caption} for row, caption in enumerate(captions)]
        if "json" in name:
            text = json.dumps(rows) if name == "train.json" else "\n".join(map(json.dumps, rows))
        else:
            mark = "\t" if "tsv" in name else ","
            text = "\n".join([f"image{mark}{column}", *(f"{row['image']}{mark}{row[column]}" for row in rows)])
        train = read(tmp_path, text, name, **given)
        assert train[column] == captions and train.features[column] == Value("string")


@pytest.mark.parametrize(("given", "wanted"), [("7,12,0", [7, 12, 0]), ("007,7,12", ["007", "7", "12"])])
@pytest.mark.parametrize("role", ["id_column", "task_column"])
def test_ids_and_tasks_are_integers_or_text(tmp_path, given, wanted, role):
    rows = "".join(f"{row}.png,a,{value}\n" for row, value in enumerate(given.split(",")))
    train = read(tmp_path, "image,caption,which\n" + rows, **{role: "which"})
    assert train["which"] == wanted
    names = {"sample_id": "which"} if role == "id_column" else {"task": "which"}
    pairs = as_pairs(train, **names)
    assert len({pairs[row]["sample_id"] for row in range(3)}) == 3
    if role == "task_column":
        tasks = [0, 1, 2] if pairs.task_names else [7, 12, 0]
        assert [pairs[row]["task_id"] for row in range(3)] == (
            [pairs.task_names.index(name) for name in wanted] if pairs.task_names else tasks
        )


@pytest.mark.parametrize("values", [["1e5", "2e5"], ["True", "False"], ["NA", "null"], ["1.0", "2.0"], ["1", "NA"]])
@pytest.mark.parametrize("column", ["label", "task", "kind"])
def test_names_of_tasks_and_labels_are_text(tmp_path, values, column):
    rows = "".join(f"{row}.png,a,{value}\n" for row, value in enumerate(values))
    train = read(tmp_path, f"image,caption,{column}\n" + rows, task_column="kind" if column == "kind" else None)
    assert train[column] == values


def test_other_columns_keep_their_numbers_from_all_rows(tmp_path):
    header = "image,caption,clean,score,count,late,code,empty,note\n"
    rows = ["0.png,a,True,0.5,1,1,010,,7\n"] * 12_000 + ["1.png,b,False,NA,,1.5,7,,x\n"]
    train = read(tmp_path, header + "".join(rows))
    kinds = {name: feature.dtype for name, feature in train.features.items() if name != "image"}
    assert kinds == {
        "caption": "string", "clean": "bool", "score": "float64", "count": "int64", "late": "float64",
        "code": "string", "empty": "string", "note": "string",
    }  # fmt: skip
    last = train[-1]
    assert (last["clean"], last["score"], last["count"], last["late"], last["code"]) == (False, None, None, 1.5, "7")
    assert train[0]["code"] == "010" and train[0]["note"] == "7" and train[0]["empty"] is None


def test_types_are_those_of_all_splits_but_ids_are_those_of_their_own(tmp_path):
    write(tmp_path, "image,caption,domain,number\n0.png,a,1,1\n", "train.csv")
    write(tmp_path, "image,caption,domain,number\n0.png,a,NA,007\n", "test.csv")
    splits = load(tmp_path, id_column="number", task_column="domain")
    assert splits["train"]["domain"] == ["1"] and splits["test"]["domain"] == ["NA"]
    assert splits["train"]["number"] == [1] and splits["test"]["number"] == ["007"]


def test_json_mixes_types_without_a_stop(tmp_path):
    rows = [
        {"image": "0.png", "caption": "a", "x": 1, "y": 1, "task": "a", "z": {"k": 1}},
        {"image": "1.png", "caption": ["b", "c"], "x": "t", "y": 1.5, "task": 7, "late": True, "z": {"k": "v"}},
        {"image": "2.png", "caption": None, "big": 2**70},
    ]
    train = read(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")
    assert train["caption"] == [["a"], ["b", "c"], [None]] and train["y"] == [1.0, 1.5, None]
    assert train["task"] == ["a", "7", None] and train["late"] == [None, True, None]
    assert train["x"] == [1, "t", None] and train["z"] == [{"k": 1}, {"k": "v"}, None]
    assert train["big"] == [None, None, str(2**70)]  # larger than any column of integers


@pytest.mark.parametrize(
    "text",
    [
        '[{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": "b"}]',
        '{"image": "0.png", "caption": "a"}\n\n{"image": "1.png", "caption": "b"}\n',
        '{"image": ["0.png", "1.png"], "caption": ["a", "b"]}',
        '{"version": 1, "data": [{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": "b"}]}',
    ],
)
def test_forms_of_json(tmp_path, text):
    train = read(tmp_path, text, "train.json")
    assert train["caption"] == ["a", "b"] and train[1]["image"]["path"] == str(tmp_path / "1.png")


def test_rows_of_json_without_anything_keep_their_places(tmp_path):
    train = read(tmp_path, "{}\n" * 10_001 + '{"image": "0.png", "caption": "a"}\n', "train.jsonl")
    assert len(train) == 10_002 and train["caption"][-2:] == [None, "a"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_half_a_character_costs_its_own_row_only(tmp_path, name, caplog):
    lines = ['{"image": "0.png", "caption": "a\\ud83d"}', '{"image": "1.png", "caption": "\\ud83d\\ude00"}']
    train = read(tmp_path, "\n".join(lines) if name == "train.jsonl" else f"[{','.join(lines)}]", name)
    assert train["caption"] == [MARK + "a\\ud83d", "\U0001f600"]
    assert caplog.text.count("half a character") == 1 and name in caplog.text


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "captions.json", "dataset_x.json"])
def test_a_caption_with_half_a_character_is_counted_as_one(tmp_path, name):
    captions = ["\\ud83d", "a \\udc00 cat", "whole \\ud83d\\ude00", "plain"]
    for place in range(4):
        PIL.Image.new("RGB", (8, 8), (60 * place, 0, 0)).save(tmp_path / f"{place}.png")
    images = [f'{{"id": {place}, "file_name": "{place}.png"}}' for place in range(4)]
    notes = [f'{{"image_id": {place}, "caption": "{caption}"}}' for place, caption in enumerate(captions)]
    rows = [f'{{"image": "{place}.png", "caption": "{caption}"}}' for place, caption in enumerate(captions)]
    sentences = [
        f'{{"filename": "{place}.png", "split": "train", "sentences": [{{"raw": "{caption}"}}]}}'
        for place, caption in enumerate(captions)
    ]
    text = {
        "train.jsonl": "\n".join(rows),
        "train.json": f"[{','.join(rows)}]",
        "captions.json": f'{{"images": [{",".join(images)}], "annotations": [{",".join(notes)}]}}',
        "dataset_x.json": f'{{"images": [{",".join(sentences)}]}}',
    }[name]
    (tmp_path / name).write_text(text)
    pairs = as_pairs(load_splits(source="folder", path=str(tmp_path))["train"])
    processor = tiny_models.tiny_clip()[1]
    batch = SelectionCollator(processor)(pairs.__getitems__(list(range(4))))
    half = BadReason.CAPTION_NOT_UNICODE
    assert batch["bad_reason"].tolist() == [half, half, 0, 0]
    assert [split_problem(text)[0] for text in read_problems(batch).values()] == ["\\ud83d", "a \\udc00 cat"]
    assert list(pairs.captions()) == ["whole \U0001f600", "plain"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n[1]\n', r"line 2: list instead of an object"),
        ('{"a": 1}\n\n{"a": \n', r"not readable as json \(line 3,"),
        ("\n\n", "no rows"),
    ],
)
def test_broken_lines_of_json_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"train\.jsonl.*{message}"):
        read(tmp_path, text, "train.jsonl")


# rows that do not fit


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("image,caption\n0.png,a\n1.png,b,c\n", 3, "3 fields, but the header has 2"),
        ("image,caption\n0.png,a\n1.png\n2.png,c\n", 3, "1 fields, but the header has 2"),
        ('image,caption\n0.png,"a\nb"\n\n1.png,b,c\n', 5, "3 fields"),
        ("image,caption\n" + "0.png,a\n" * 20_000 + "1.png,b,\n", 20_002, "3 fields"),
        ("image,caption\n0,0.png,a\n1,1.png,b\n", 2, "3 fields"),  # pandas would take the first field as an index
        ('image,caption,x\n0.png,"a" cat,1\n1.png,b\n', 2, "expected after"),
        ('image,caption,x\n0.png,"a, cat,1\n1.png,b,2\n', 2, "unexpected end of data"),
    ],
)
def test_ragged_rows_are_named_and_never_shifted(tmp_path, text, line, message):
    with pytest.raises(ValueError, match=rf"train\.csv', line {line}: .*{message}.*data\.separator"):
        read(tmp_path, text)


def test_quotes_line_ends_and_blank_lines(tmp_path):
    text = (
        'image,caption\r\n0.png,"a ""big"" cat,\r\non a mat"\r\n\r\n1.png,\r\n2.png,""\r\n  \r\n3.png,5\'7" tall\r\n'
    )
    captions = read(tmp_path, text)["caption"]
    assert captions == ['a "big" cat,\r\non a mat', None, None, "5'7\" tall"]
    assert read(tmp_path, "image,caption\r0.png,a\r1.png,b", "train.csv")["caption"] == ["a", "b"]  # an old Mac
    long = "x" * 200_000
    assert read(tmp_path, f"image,caption\n0.png,{long}\n")["caption"] == [long]


def test_text_that_knows_no_quoting(tmp_path, caplog):
    rows = ['0.png\t"Stop" says a sign', '1.png\t"left open', "2.png\tb", '3.png\tit says "', "4.png\tc"]
    with caplog.at_level(logging.WARNING):
        train = read(tmp_path, "\n".join(["image\tcaption", *rows]), "train.tsv")
    assert train["caption"] == ['"Stop" says a sign', '"left open', "b", 'it says "', "c"]
    assert "read without quoting" in caplog.text
    # No error of quotes here: the open one would swallow two rows.
    assert read(tmp_path, "\n".join(["image\tcaption", *rows[1:]]), "train.tsv")["caption"][0] == '"left open'


def test_captions_of_open_clip_can_be_exchanged(tmp_path):
    rows = "".join(f"{row}.jpg\tcaption {row}\n" for row in range(20))
    train = read(tmp_path, "filepath\ttitle\n" + rows, noise_rate=0.5)
    assert sum(train["clean"]) == 10 and sorted(train["title"]) == sorted(f"caption {row}" for row in range(20))
    with pytest.raises(ValueError, match="No column named caption"):
        as_pairs(read(tmp_path, "image\ttitle\n0.jpg\ta\n"))  # a title may be anything


def test_metadata_made_on_windows(tmp_path):
    text = "\ufefffile_name;caption\r\ntrain\\a b.png;NA\r\ntest\\b.png;é\r\n"
    for encoding in ("utf-8", "utf-16-le"):
        write(tmp_path, text, "metadata.csv", encoding)
        splits = load_splits(source="imagefolder", path=str(tmp_path))
        assert {split: list(rows["caption"]) for split, rows in splits.items()} == {"train": ["NA"], "test": ["é"]}
        assert splits["train"][0]["image"]["path"] == str(tmp_path / "train/a b.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_cache_and_stream_give_the_same_rows(tmp_path, streaming, name):
    text = "image,caption,label\n" + "".join(f"{row}.png,{row:03},{row}\n" for row in range(30))
    if name == "train.jsonl":
        text = "".join(f'{{"image": "{row}.png", "caption": "{row:03}", "label": {row}}}\n' for row in range(30))
    path = write(tmp_path, text, name)
    for _ in range(2):
        rows = list(load(path, streaming=streaming)["train"])
        assert [row["caption"] for row in rows] == [f"{row:03}" for row in range(30)]
        assert [row["label"] for row in rows] == list(range(30))


@pytest.mark.parametrize("separator", [",", "\t"])
def test_column_twice(tmp_path, separator):
    text = separator.join(["image", "caption", "caption"]) + "\n" + separator.join(["0.png", "a", "b"]) + "\n"
    with pytest.raises(ValueError, match=r"train\.csv' has the column 'caption' twice \(columns 2 and 3\)"):
        read(tmp_path, text)
    text = separator.join(["", "image", "caption", "x", "x", "x.1", ""]) + "\n" + separator.join("0abcdef") + "\n"
    names = read(tmp_path, text).column_names
    assert names == ["Unnamed: 0", "image", "caption", "x", "x.2", "x.1", "Unnamed: 6"]


@pytest.mark.parametrize("text", ["image,caption\n", "image,caption", "\n\nimage,caption\n\n"])
def test_header_only(tmp_path, text):
    with pytest.raises(ValueError, match=r"train\.csv: no rows, only a header\. Remove it"):
        read(tmp_path, text)


def test_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"train\.csv' is empty \(0 bytes\)"):
        read(tmp_path, "")
    with pytest.raises(ValueError, match=r"train\.csv' holds no header"):
        read(tmp_path, "\n \n")
    # One empty shard among others, as tools write it, has no rows to lose.
    write(tmp_path, "image,caption\n0.png,a\n", "train-1.csv")
    write(tmp_path, "image,caption\n", "train-0.csv")
    (tmp_path / "train.csv").unlink()
    assert load(tmp_path)["train"]["caption"] == ["a"]


def test_files_of_a_split(tmp_path):
    write(tmp_path, "image,caption\n0.png,a\n", "train-0.csv")
    write(tmp_path, "caption\timage\nb\t1.png\n", "train-1.tsv")
    write(tmp_path, "image;caption\n2.png;c\n", "train-2.csv.gz")
    train = load(tmp_path)["train"]
    assert train["caption"] == ["a", "b", "c"] and train[1]["image"]["path"] == str(tmp_path / "1.png")
    write(tmp_path, "image,caption,x\n0.png,a,b\n", "train-3.csv")
    with pytest.raises(ValueError, match=r"train-3\.csv' has the columns image, caption, x, but train-0\.csv has"):
        load(tmp_path)


def test_changed_file_is_read_again(tmp_path):
    for caption in ("old", "newer", "NA"):
        assert read(tmp_path, f"image,caption\n0.png,{caption}\n")["caption"] == [caption]


@pytest.mark.parametrize("name", ["train.csv.gz", "train.jsonl.gz"])
def test_damaged_gz(tmp_path, name):
    text = "image,caption\n0.png,a\n" if "csv" in name else '{"caption": "a"}\n'
    path = write(tmp_path, text * 100, name)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[:-20], b"no gz at all"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}' is not a whole \.gz file"):
            load(path)


def test_hidden_and_foreign_files_are_left_alone(tmp_path, caplog):
    write(tmp_path, "image,caption,train,split\n0.png,a,x,train\n1.png,b,y,test\n", "pairs of mine.csv")
    for name in (
        ".DS_Store",
        "._pairs of mine.csv",
        ".ipynb_checkpoints/train.csv",
        "README.md",
        "dataset_infos.json",
    ):
        write(tmp_path, "nothing\0", name)
    with caplog.at_level(logging.WARNING):
        splits = load(tmp_path)
    assert list(splits) == ["train"] and splits["train"]["caption"] == ["a", "b"]
    assert "column 'split' holds test, train, but all rows are read as train" in caplog.text


def test_paths_of_pictures(tmp_path):
    (tmp_path / "odd\\name.png").touch()
    given = [
        "a\\b c.png", "/elsewhere/0.png", "C:\\data\\0.png", "ü/0.png", "odd\\name.png", "./x/../y.png",
        "file:///tmp/1.png", "",
    ]  # fmt: skip
    rows = "".join(f"{path},a\n" for path in given)
    found = [image and image["path"] for image in read(tmp_path, "image,caption\n" + rows)["image"]]
    root = str(tmp_path)
    assert found == [
        f"{root}/a/b c.png", "/elsewhere/0.png", "C:\\data\\0.png", f"{root}/ü/0.png", f"{root}/odd\\name.png",
        f"{root}/./x/../y.png", "/tmp/1.png", None,
    ]  # fmt: skip


def test_image_root(tmp_path):
    text = "image,caption\na/0.png,a\n/elsewhere/1.png,b\n"
    (tmp_path / "pictures").mkdir()
    for name in ("tables/train.csv", "tables/train.jsonl"):
        content = text if name.endswith("csv") else '{"image": "a/0.png"}\n{"image": "/elsewhere/1.png"}\n'
        train = load(write(tmp_path, content, name), image_root=str(tmp_path / "pictures"))["train"]
        (tmp_path / name).unlink()
        assert [image["path"] for image in train["image"]] == [str(tmp_path / "pictures/a/0.png"), "/elsewhere/1.png"]
    write(tmp_path, text, "tables/train.csv")
    write(tmp_path, "file_name,caption\n0.png,a\n", "meta/metadata.csv")
    train = load_splits(source="imagefolder", path=str(tmp_path / "meta"), image_root=str(tmp_path / "pictures"))
    assert train["train"][0]["image"]["path"] == str(tmp_path / "pictures/0.png")
    for source in ("folder", "hub"):
        with pytest.raises(FileNotFoundError, match=r"data\.image_root '.*nowhere' is not a folder"):
            load_splits(source=source, path=str(tmp_path / "tables"), image_root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data\.image_root is 'x', but data\.source 'webdataset'"):
        load_splits(source="webdataset", path="x", image_root="x")


def test_web_addresses_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"image_column='image' holds web addresses such as 'https://a/0\.jpg'"):
        read(tmp_path, "image,caption\nhttps://a/0.jpg,a\nhttp://b/1.jpg,b\n,c\n")
    mixed = read(tmp_path, "image,caption\nhttps://a/0.jpg,a\n1.jpg,b\n")
    assert mixed[0]["image"]["path"] == "https://a/0.jpg"
