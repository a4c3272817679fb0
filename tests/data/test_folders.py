"""Folders that hold no plain table: saved data sets, img2dataset, captions next to pictures, classes, COCO."""

import io
import json
import logging

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from testing.tar_files import write_tar

from hf_dissect.data import as_pairs
from hf_dissect.data.loading import load_splits
from hf_dissect.data.surrogates import MARK


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(shade=0):
    stream = io.BytesIO()
    Picture.new("RGB", (8, 6), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(folder, files):
    """Write files by name: text, bytes, JSON of anything else, or a picture for None."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = picture(len(name))
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def load(path, source="folder", **given):
    return load_splits(source=source, path=str(path), **given)


def sizes(splits):
    return {split: len(rows) for split, rows in splits.items()}


def names(rows, root):
    return [image["path"].removeprefix(f"{root}/") for image in rows["image"]]


# save_to_disk


def table(*captions, **columns):
    rows = {"image": [{"bytes": picture(), "path": None}] * len(captions), "caption": list(captions), **columns}
    kinds = {name: Value("int64") for name in columns}
    return Dataset.from_dict(rows, Features({"image": Image(), "caption": Value("string"), **kinds}))


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset(tmp_path, streaming):
    table("a", "b").with_format("torch").save_to_disk(str(tmp_path / "saved"))
    splits = load(tmp_path / "saved", streaming=streaming)
    (row, _) = list(splits["train"])
    assert list(splits) == ["train"] and row == {"image": {"bytes": picture(), "path": None}, "caption": "a"}
    assert splits["train"].features["image"] == Image(decode=False)


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_saved_dataset_dict(tmp_path, validation, caplog):
    parts = {"train": table("a", "b"), validation: table("c"), "test": table("d"), "extra": table("e")}
    DatasetDict(parts).save_to_disk(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        splits = load(tmp_path)
    assert {split: list(rows["caption"]) for split, rows in splits.items()} == {
        "train": ["a", "b"], "validation": ["c"], "test": ["d"],
    }  # fmt: skip
    assert "the splits extra" in caplog.text
    assert sizes(load(tmp_path, train_split="extra", validation_split=None, test_split=None)) == {"train": 1}
    with pytest.raises(ValueError, match=r"no train split: none begins with 'noisy'; it has train, "):
        load(tmp_path, train_split="noisy")


def test_saved_dataset_of_several_train_splits_and_folders(tmp_path):
    DatasetDict({"train_clean": table("a"), "train_noisy": table("b")}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(
        ValueError, match=r"several splits for train: train_clean, train_noisy\. Set data\.train_split"
    ):
        load(tmp_path / "dict")
    assert load(tmp_path / "dict", train_split="train_noisy")["train"]["caption"] == ["b"]
    for split in ("train", "test"):
        table(split).save_to_disk(str(tmp_path / "folders" / split))
    assert sizes(load(tmp_path / "folders")) == {"train": 1, "test": 1}


def test_damaged_saved_dataset_and_paths(tmp_path):
    Dataset.from_dict({"image": ["a/0.png"], "caption": ["NA"]}).save_to_disk(str(tmp_path / "paths"))
    train = load(tmp_path / "paths", image_root=str(tmp_path))["train"]
    assert names(train, tmp_path) == ["a/0.png"] and train["caption"] == ["NA"]
    table("a").save_to_disk(str(tmp_path / "broken"))
    next((tmp_path / "broken").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=r"broken' was written by save_to_disk, but cannot be loaded"):
        load(tmp_path / "broken")


# img2dataset

STATS = {"count": 2, "successes": 2, "failed_to_download": 0, "status_dict": {"success": 2}}


def img2dataset_table(folder, shard, **columns):
    rows = {
        "url": ["http://a/0.jpg", "http://a/1.jpg"],
        "caption": ["from the table"] * 2,
        "key": ["0", "1"],
        **columns,
    }
    Dataset.from_dict(rows).to_parquet(str(folder / f"{shard}.parquet"))


@pytest.mark.parametrize("source", ["folder", "webdataset"])
@pytest.mark.parametrize("streaming", [False, True])
def test_img2dataset_tars(tmp_path, source, streaming):
    for shard in ("00000", "00001"):
        members = {}
        for row in range(2):
            members |= {
                f"{shard}{row:04}.jpg": picture(row),
                f"{shard}{row:04}.txt": f"caption {shard} {row}".encode(),
            }
            members[f"{shard}{row:04}.json"] = json.dumps({"url": "u", "caption": "x", "status": "success"}).encode()
        write_tar(tmp_path / f"{shard}.tar", members)
        img2dataset_table(tmp_path, shard)
        write(tmp_path, {f"{shard}_stats.json": STATS})
    splits = load(tmp_path, source, streaming=streaming)
    rows = list(splits["train"])
    assert list(splits) == ["train"]
    assert [row["caption"] for row in rows] == [
        f"caption {shard} {row}" for shard in ("00000", "00001") for row in (0, 1)
    ]
    assert rows[1]["image"]["bytes"] == picture(1)


@pytest.mark.parametrize("source", ["folder", "imagefolder"])
def test_img2dataset_files(tmp_path, source):
    for shard in ("00000", "00001"):
        for row in range(2):
            key = f"{shard}/{shard}{row:04}"
            record = {"url": "u", "caption": f"record {key}", "status": "success", "exif": "{}"}
            write(
                tmp_path, {f"{key}.jpg": None, f"{key}.txt": f"caption {row}\n" if row else "", f"{key}.json": record}
            )
        write(tmp_path, {f"{shard}_stats.json": STATS})
        img2dataset_table(tmp_path, shard)
    train = load(tmp_path, source)["train"]
    assert train["caption"] == ["record 00000/000000000", "caption 1", "record 00001/000010000", "caption 1"]
    assert names(train, tmp_path)[3] == "00001/000010001.jpg"


def test_img2dataset_parquet_with_pictures(tmp_path):
    img2dataset_table(tmp_path, "00000", jpg=[picture(0), picture(1)])
    write(tmp_path, {"00000_stats.json": STATS})
    pairs = as_pairs(load(tmp_path)["train"])
    assert pairs.columns.image == "jpg" and pairs[1]["image"]["bytes"] == picture(1)


# captions next to pictures


@pytest.mark.parametrize("source", ["folder", "imagefolder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_next_to_pictures(tmp_path, source, streaming):
    write(
        tmp_path,
        {
            "a b.JPG": None, "a b.txt": "\ufeffNA\n", "ü.png": None, "ü.caption": "two\nlines", "none.webp": None,
            "empty.png": None, "empty.txt": " \n", "j.png": None, "j.json": {"caption": "from json"},
            "notes.txt": "no picture", ".DS_Store": "\0", ".hidden/x.png": None, "README.md": "about",
            "._a b.JPG": b"\0",
        },
    )  # fmt: skip
    splits = load(tmp_path, source, streaming=streaming)
    rows = list(splits["train"])
    found = {row["image"]["path"].removeprefix(f"{tmp_path}/"): row["caption"] for row in rows}
    assert found == {
        "a b.JPG": "NA", "ü.png": "two\nlines", "none.webp": None, "empty.png": None, "j.png": "from json",
    }  # fmt: skip


@pytest.mark.parametrize("top", ["", "images/", "data/pictures/"])
def test_captions_next_to_pictures_by_split(tmp_path, top):
    for split, count in (("train2017", 3), ("val2017", 2), ("test", 1)):
        for row in range(count):
            write(tmp_path, {f"{top}{split}/deep/test_{row}.png": None, f"{top}{split}/deep/test_{row}.txt": f"{row}"})
    splits = load(tmp_path)
    assert sizes(splits) == {"train": 3, "validation": 2, "test": 1}
    assert splits["validation"]["caption"] == ["0", "1"]
    assert sizes(load(tmp_path, test_split=None)) == {"train": 3, "validation": 2}


def test_encoding_of_captions_next_to_pictures(tmp_path):
    write(tmp_path, {"0.png": None, "0.txt": "café".encode("latin-1")})
    assert load(tmp_path, encoding="latin-1")["train"]["caption"] == ["café"]
    with pytest.raises(ValueError, match=r"0\.txt', line 1: not text in the encoding utf-8.*data\.encoding"):
        load(tmp_path)


# class folders


@pytest.mark.parametrize("source", ["folder", "imagefolder"])
def test_class_folders(tmp_path, source):
    files = [
        "dog/0.png",
        "dog/1.png",
        "golden_retriever/0.JPG",
        "golden_retriever/b.png",
        "train/x.png",
        "valley/0.gif",
    ]
    write(tmp_path, dict.fromkeys(files))
    write(tmp_path, {"README.md": "about", ".cache/0.png": None, "dog/.DS_Store": ""})
    splits = load(tmp_path, source)
    train = splits["train"]
    assert list(splits) == ["train"] and sorted(names(train, tmp_path)) == sorted(files)
    assert train.features["label"] == ClassLabel(names=["dog", "golden_retriever", "train", "valley"])
    # One of each class comes before the second of any.
    assert train["label"][:4] == [0, 1, 2, 3] and train["label"][4:] == [0, 1]
    assert train["caption"][:3] == ["a photo of a dog", "a photo of a golden retriever", "a photo of a train"]


@pytest.mark.parametrize("template", ["a {}, seen by a child", "a {class}, seen by a child"])
def test_class_folders_by_split_and_template(tmp_path, template, caplog):
    for split in ("train", "val", "test"):
        write(tmp_path, {f"{split}/{name}/{split}_0.png": None for name in ("cat", "dog")})
    write(tmp_path, {"samples/cat/0.png": None, "logo.png": None})
    with caplog.at_level(logging.WARNING):
        splits = load(tmp_path, class_template=template)
    assert sizes(splits) == {"train": 2, "validation": 2, "test": 2}
    assert splits["test"]["caption"] == ["a cat, seen by a child", "a dog, seen by a child"]
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert "Left out, as the folder names no split" in caplog.text and "samples" in caplog.text
    with pytest.raises(ValueError, match=r"data\.class_template is 'a photo', but must hold \{\} or \{class\}"):
        load(tmp_path, class_template="a photo")


def test_class_folders_that_are_none(tmp_path):
    write(tmp_path, {"images/0.png": None, "images/1.png": None})
    with pytest.raises(
        FileNotFoundError, match=r"found images \(2 x \.png\).*neither captions nor classes.*class fold"
    ):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of metadata\.csv"):
        load(tmp_path, "imagefolder")
    for split in ("train", "test"):
        write(tmp_path / "inside", {f"{name}/{split}/0.png": None for name in ("cat", "dog")})
    with pytest.raises(ValueError, match=r"splits inside of the folders of the classes.*train/dog/0\.jpg"):
        load(tmp_path / "inside")
    write(tmp_path / "tests", {f"{split}/{name}/0.png": None for name in ("cat", "dog") for split in ("val", "test")})
    with pytest.raises(ValueError, match=r"no train split: no subfolder is named 'train'; found test, val"):
        load(tmp_path / "tests")


def test_stray_picture_is_a_bad_row(tmp_path, caplog):
    write(tmp_path, {"cat/0.png": None, "dog/0.png": None, "logo.png": None})
    with caplog.at_level(logging.WARNING):
        train = load(tmp_path)["train"]
    assert sorted(train["caption"], key=str) == [None, "a photo of a cat", "a photo of a dog"]
    assert "Without a class, as they lie in no class folder: logo.png" in caplog.text


def test_folder_with_a_loop_of_links(tmp_path):
    write(tmp_path, {"cat/0.png": None, "dog/0.png": None})
    (tmp_path / "dog" / "up").symlink_to(tmp_path, target_is_directory=True)
    write(tmp_path.parent / "elsewhere", {"0.png": None})
    (tmp_path / "bird").symlink_to(tmp_path.parent / "elsewhere", target_is_directory=True)
    assert sorted(names(load(tmp_path)["train"], tmp_path)) == ["bird/0.png", "cat/0.png", "dog/0.png"]


# what cannot be read


def test_message_says_what_was_found_and_what_can_be_read(tmp_path):
    write(tmp_path, {"a.docx": "x", "b.docx": "x", "c.npy": "x"})
    with pytest.raises(FileNotFoundError, match=r"2 x \.docx, 1 x \.npy.*tables \(\.parquet.*save_to_disk.*class"):
        load(tmp_path)
    write(tmp_path, {"captions.csv": "image,caption\n0.png,a\n", "0.png": None})
    with pytest.raises(FileNotFoundError, match=r"Set data\.source to folder to read captions\.csv"):
        load(tmp_path, "imagefolder")


# COCO


def coco(*files, first_id=0, captions=2, **image):
    images = [{"id": first_id + row, "file_name": name, "width": 8, **image} for row, name in enumerate(files)]
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        "images": images,
        "annotations": [
            {"id": 10 * each["id"] + number, "image_id": each["id"], "caption": f"{each['id']} {number}"}
            for number in range(captions)
            for each in reversed(images)
        ],
    }


@pytest.mark.parametrize("year", ["2014", "2017"])
@pytest.mark.parametrize("where", ["", "images/"])
def test_coco(tmp_path, year, where):
    content = {
        f"annotations/captions_train{year}.json": coco("a.png", "b.png"),
        f"annotations/captions_val{year}.json": coco("a.png", first_id=7),
        f"annotations/instances_train{year}.json": {**coco("a.png"), "annotations": [{"image_id": 0, "bbox": [1]}]},
        f"{where}train{year}/a.png": None,
        f"{where}train{year}/b.png": None,
        f"{where}val{year}/a.png": None,
    }
    write(tmp_path, content)
    for path in (tmp_path, tmp_path / "annotations"):
        splits = load(path)
        assert sizes(splits) == {"train": 2, "validation": 1}
        assert splits["train"]["captions"] == [["0 0", "0 1"], ["1 0", "1 1"]]
        assert splits["validation"]["image_id"] == [7]
        assert names(splits["validation"], tmp_path) == [f"{where}val{year}/a.png"]
        assert len(as_pairs(splits["train"])) == 4
    single = load(tmp_path / "annotations" / f"captions_val{year}.json")
    assert sizes(single) == {"train": 1} and names(single["train"], tmp_path) == [f"{where}val{year}/a.png"]
    with pytest.raises(ValueError, match=r"annotations without captions.*captions_train2017\.json"):
        load(tmp_path / "annotations" / f"instances_train{year}.json")


def test_coco_elsewhere_and_strange(tmp_path):
    write(tmp_path, {"pictures/x y/0.png": None, "pairs/dataset.json": coco("x y/0.png", "gone.png", captions=1)})
    train = load(tmp_path / "pairs", image_root=str(tmp_path / "pictures"))["train"]
    assert names(train, tmp_path) == ["pictures/x y/0.png", "pictures/gone.png"]
    assert train["captions"] == [["0 0"], ["1 0"]]
    empty = coco("a.png", "b.png", captions=1)
    empty["annotations"] = [{"image_id": 1, "caption": "NA"}, {"image_id": 1, "caption": "a\ud800"}]
    write(tmp_path, {"empty/train.json": empty})
    assert load(tmp_path / "empty")["train"]["captions"] == [[], ["NA", MARK + "a\\ud800"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["annotations"].append({"image_id": 99, "caption": "x"}), r"image_id.*99"),
        (lambda content: content["images"].append({"id": 0, "file_name": "c.png"}), r"two images have the id 0"),
        (lambda content: content["images"].append({"id": 5}), r"image without id or file_name: \{'id': 5\}"),
    ],
)
def test_coco_errors(tmp_path, change, message):
    content = coco("a.png", "b.png")
    change(content)
    write(tmp_path, {"captions_train.json": content})
    with pytest.raises(ValueError, match=rf"captions_train\.json'.*{message}"):
        load(tmp_path)


def test_karpathy_splits(tmp_path, caplog):
    images = [
        {
            "filepath": "val2014", "filename": f"{number}.jpg", "imgid": number, "cocoid": 100 + number,
            "split": split,
            "sentences": [{"raw": f"{number} {which}", "tokens": ["x"]} for which in range(2)],
        }
        for number, split in enumerate(["train", "restval", "val", "test", "train", "odd"])
    ]  # fmt: skip
    write(tmp_path, {"dataset_coco.json": {"dataset": "coco", "images": images}, "val2014/0.jpg": None})
    with caplog.at_level(logging.WARNING):
        splits = load(tmp_path)
    assert sizes(splits) == {"train": 3, "validation": 1, "test": 1} and "left out the splits odd" in caplog.text
    assert splits["train"]["image_id"] == [100, 101, 104] and splits["test"]["captions"] == [["3 0", "3 1"]]
    assert names(splits["train"], tmp_path)[0] == "val2014/0.jpg"
    for image in images:
        del image["filepath"], image["cocoid"]
    write(tmp_path, {"flickr/dataset_flickr8k.json": {"images": images[2:]}, "flickr/Images/2.jpg": None})
    splits = load(tmp_path / "flickr" / "dataset_flickr8k.json")
    assert names(splits["validation"], tmp_path) == ["flickr/Images/2.jpg"]
    assert splits["train"]["image_id"] == [4]
    with pytest.raises(ValueError, match=r"no pictures of the split 'noisy'"):
        load(tmp_path / "flickr" / "dataset_flickr8k.json", train_split="noisy")


def test_hub_table_of_paths_takes_the_image_root(tmp_path):
    Dataset.from_dict({"image": ["a/0.png"], "caption": ["a"]}).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    train = load(tmp_path / "hub", "hub", image_root=str(tmp_path))["train"]
    assert names(train, tmp_path) == ["a/0.png"]
    with pytest.raises(ValueError, match=r"data\.image_root is .* with data\.streaming"):
        load(tmp_path / "hub", "hub", image_root=str(tmp_path), streaming=True)
