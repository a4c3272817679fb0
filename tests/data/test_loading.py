import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from testing.tar_files import write_tar

from hf_dissect.data.loading import load_splits
from hf_dissect.data.scenes.drawing import make_scenes

REAL_DATA = Path(os.environ.get("HF_DISSECT_DATA", Path(__file__).parents[3] / "shared" / "data"))
FLICKR8K = REAL_DATA / "flickr8k"
NOT_A_PICTURE = b"decoding this would fail"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_parquet(path, num_rows, captions=None, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "image": [image or {"bytes": NOT_A_PICTURE, "path": None}] * num_rows,
        "captions": captions or [[f"{path.stem} {row} {j}" for j in range(2)] for row in range(num_rows)],
    }
    Dataset.from_dict(rows, Features({"image": Image(), "captions": List(Value("string"))})).to_parquet(str(path))


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sizes(splits):
    return {split: len(rows) for split, rows in splits.items()}


# scenes


def test_scenes():
    splits = load_splits(scenes_train=6, scenes_validation=0, scenes_test=3, scenes_image_size=16, scenes_seed=2)
    assert sizes(splits) == {"train": 6, "test": 3}
    assert splits["test"].to_list() == make_scenes(3, seed=2, image_size=16, split="test").to_list()
    stream = load_splits(scenes_train=6, scenes_test=0, scenes_validation=0, streaming=True, max_train_rows=4)["train"]
    assert isinstance(stream, IterableDataset)
    assert list(stream) == make_scenes(4).to_list()


# folder


def test_folder_of_parquet_is_split_by_name_and_nothing_is_decoded(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", 3)
    write_parquet(tmp_path / "train-00001.parquet", 2)
    write_parquet(tmp_path / "val.parquet", 4)
    write_parquet(tmp_path / "test" / "part.parquet", 1)
    splits = load_splits(source="folder", path=str(tmp_path))
    assert sizes(splits) == {"train": 5, "validation": 4, "test": 1}
    for rows in splits.values():
        assert rows.features["image"] == Image(decode=False)
        assert rows[0]["image"]["bytes"] == NOT_A_PICTURE
    assert splits["train"]["captions"][3] == ["train-00001 0 0", "train-00001 0 1"]
    stream = load_splits(source="folder", path=str(tmp_path), streaming=True)["train"]
    assert list(stream) == splits["train"].to_list()


def test_folder_without_split_names_and_single_file_are_train(tmp_path):
    write_parquet(tmp_path / "pairs.parquet", 3)
    assert sizes(load_splits(source="folder", path=str(tmp_path))) == {"train": 3}
    assert sizes(load_splits(source="folder", path=str(tmp_path / "pairs.parquet"))) == {"train": 3}


def test_copies_in_subfolders_do_not_count_twice(tmp_path):
    write_parquet(tmp_path / "train.parquet", 3)
    write_parquet(tmp_path / "old" / "train.parquet", 2)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", 2)
    assert sizes(load_splits(source="folder", path=str(tmp_path))) == {"train": 3, "test": 2}


def test_split_names_can_be_chosen_or_left_out(tmp_path):
    for name in ("clean", "train", "test", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", len(name))
    splits = load_splits(source="folder", path=str(tmp_path), train_split="clean", test_split=None)
    assert sizes(splits) == {"train": len("clean"), "validation": len("validation")}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_paths_become_absolute_and_may_be_missing(tmp_path, kind):
    elsewhere = str(tmp_path.parent / "other.png")
    paths = ["images/0.png", elsewhere, "images/not there.png"]
    if kind == "jsonl":
        write_jsonl(tmp_path / "train.jsonl", [{"image": path, "text": "a"} for path in paths])
    else:
        (tmp_path / "train.csv").write_text("image,text\n" + "".join(f"{path},a\n" for path in paths))
    train = load_splits(source="folder", path=str(tmp_path))["train"]
    assert train.features["image"] == Image(decode=False)
    found = [image["path"] for image in train["image"]]
    assert found == [str(tmp_path / paths[0]), elsewhere, str(tmp_path / paths[2])]
    assert all(image["bytes"] is None for image in train["image"])


def test_named_image_column_is_not_renamed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"picture": "0.png", "text": "a"}, {"picture": None, "text": "b"}])
    train = load_splits(source="folder", path=str(tmp_path), image_column="picture")["train"]
    assert train[0]["picture"] == {"bytes": None, "path": str(tmp_path / "0.png")}
    assert train[1]["picture"] is None


def test_plain_bytes_and_paths_in_parquet(tmp_path):
    rows = Dataset.from_dict({"image": [b"one", b"two"], "caption": ["a", "b"]})
    rows.to_parquet(str(tmp_path / "bytes" / "train.parquet"))
    train = load_splits(source="folder", path=str(tmp_path / "bytes"))["train"]
    assert [image["bytes"] for image in train["image"]] == [b"one", b"two"]
    images = [{"bytes": None, "path": "a.png"}, {"bytes": b"two", "path": None}]
    rows = Dataset.from_dict({"image": images, "caption": ["a", "b"]})
    rows.to_parquet(str(tmp_path / "paths" / "train.parquet"))
    train = load_splits(source="folder", path=str(tmp_path / "paths"))["train"]
    assert train["image"] == [{"bytes": None, "path": str(tmp_path / "paths" / "a.png")}, images[1]]


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path '.*nowhere' does not exist; .* holds nothing"):
        load_splits(source="folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet, .*found nothing"):
        load_splits(source="folder", path=str(tmp_path))
    (tmp_path / "0.tar").touch()
    with pytest.raises(FileNotFoundError, match="set data.source to webdataset"):
        load_splits(source="folder", path=str(tmp_path))
    write_parquet(tmp_path / "test.parquet", 2)
    with pytest.raises(ValueError, match=r"no train split.*'train'; found test\.parquet"):
        load_splits(source="folder", path=str(tmp_path))
    with pytest.raises(ValueError, match="begins with 'noisy'"):
        load_splits(source="folder", path=str(tmp_path), train_split="noisy")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    write_parquet(tmp_path / "train.parquet", 2)
    with pytest.raises(ValueError, match=r"one format, found train\.jsonl, train\.parquet"):
        load_splits(source="folder", path=str(tmp_path))


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_broken_parquet_is_named(tmp_path, keep):
    write_parquet(tmp_path / "train-0.parquet", 3)
    whole = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"train-1\.parquet' is (empty|not a readable Parquet file)"):
        load_splits(source="folder", path=str(tmp_path))


def test_damaged_pages_and_json_are_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", 200)
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet: not readable as parquet"):
        load_splits(source="folder", path=str(tmp_path))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl: not readable as json"):
        load_splits(source="folder", path=str(tmp_path / "broken.jsonl"))
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"notes\.docx.*\.parquet"):
        load_splits(source="folder", path=str(tmp_path / "notes.docx"))


# imagefolder


def test_image_folder_with_metadata_in_subfolders(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"file_name": f"{row}.jpg", "captions": ["a", "b"]} for row in range(count)]
        write_jsonl(tmp_path / split / "metadata.jsonl", rows)
    splits = load_splits(source="imagefolder", path=str(tmp_path))
    assert sizes(splits) == {"train": 3, "test": 2}
    assert splits["train"].features["image"] == Image(decode=False)
    assert splits["test"][1] == {
        "image": {"bytes": None, "path": str(tmp_path / "test" / "1.jpg")},
        "captions": ["a", "b"],
    }


def test_image_folder_with_one_metadata_file(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\ncats/0.jpg,a cat\n")
    train = load_splits(source="imagefolder", path=str(tmp_path))["train"]
    assert train[0] == {"image": {"bytes": None, "path": str(tmp_path / "cats/0.jpg")}, "caption": "a cat"}


def test_one_metadata_file_is_split_by_the_folders_of_its_pictures(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\ntest/0.jpg,a\ntrain/1.jpg,b\ntest/2.jpg,c\n")
    splits = load_splits(source="imagefolder", path=str(tmp_path))
    assert {split: list(rows["caption"]) for split, rows in splits.items()} == {"train": ["b"], "test": ["a", "c"]}
    assert splits["test"][1]["image"]["path"] == str(tmp_path / "test/2.jpg")


def test_image_folder_errors(tmp_path):
    (tmp_path / "0.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"none of metadata\.csv.*found 0\.jpg"):
        load_splits(source="imagefolder", path=str(tmp_path))
    (tmp_path / "metadata.csv").write_text("picture,caption\n0.jpg,a\n")
    with pytest.raises(ValueError, match=r"no column 'file_name'.*\['picture', 'caption'\]"):
        load_splits(source="imagefolder", path=str(tmp_path))


# webdataset


def write_shards(folder, count=3):
    for shard in range(count):
        members = {}
        for row in range(2):
            members[f"{shard}{row}.{'jpg' if row else 'png'}"] = NOT_A_PICTURE
            members[f"{shard}{row}.txt"] = f"caption {shard}{row}\n".encode()
        write_tar(folder / f"shard-{shard:03d}.tar", members)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["", "shard-*.tar", "shard-{000..002}.tar", "shard-00{0,1,2}.tar"])
def test_tar_shards(tmp_path, streaming, path):
    write_shards(tmp_path)
    train = load_splits(source="webdataset", path=str(tmp_path / path), streaming=streaming)["train"]
    assert isinstance(train, IterableDataset if streaming else Dataset)
    keys = ["00", "01", "10", "11", "20", "21"]
    picture = {"bytes": NOT_A_PICTURE, "path": None}
    assert list(train) == [{"image": picture, "caption": f"caption {key}", "__key__": key} for key in keys]
    assert train.features["image"] == Image(decode=False)


def test_tar_shards_with_json_splits_and_gaps(tmp_path):
    record = {"captions": ["a", "b"], "similarity": 0.5, "clean": True, "nested": {}}
    write_tar(
        tmp_path / "train-0.tar",
        {"a/0.webp": b"x", "a/0.json": json.dumps(record).encode(), "a/1.json": b"{broken", "a/2.webp": b"y"},
    )
    write_tar(tmp_path / "test-0.tar", {"7.jpg": b"x", "7.json": b'{"caption": "c"}'})
    splits = load_splits(source="webdataset", path=str(tmp_path / "{train,test}-*.tar"))
    picture = {"bytes": b"x", "path": None}
    assert splits["train"][0] == {
        "image": picture, "captions": ["a", "b"], "__key__": "a/0", "similarity": 0.5, "clean": True,
    }  # fmt: skip
    assert splits["train"][1]["image"] is None and splits["train"][1]["captions"] == []
    assert splits["train"][2]["image"]["bytes"] == b"y" and splits["train"][2]["captions"] == []
    assert list(splits["test"]) == [{"image": picture, "caption": "c", "__key__": "7"}]


def test_changed_shard_is_read_again(tmp_path):
    for caption in ("old", "newer"):
        write_tar(tmp_path / "0.tar", {"0.jpg": b"x", "0.txt": caption.encode()})
        assert load_splits(source="webdataset", path=str(tmp_path))["train"]["caption"] == [caption]


def test_tar_shard_errors(tmp_path):
    write_shards(tmp_path, count=2)
    with pytest.raises(FileNotFoundError, match=r"no file '.*shard-002\.tar'"):
        load_splits(source="webdataset", path=str(tmp_path / "shard-{000..002}.tar"))
    whole = (tmp_path / "shard-000.tar").read_bytes()
    (tmp_path / "shard-001.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"shard-001\.tar' is not a readable tar file"):
        load_splits(source="webdataset", path=str(tmp_path))
    stream = load_splits(source="webdataset", path=str(tmp_path), streaming=True)["train"]
    with pytest.raises(ValueError, match=r"shard-001\.tar' is not a readable tar file"):
        list(stream)
    write_tar(tmp_path / "text" / "0.tar", {"0.txt": b"x"})
    with pytest.raises(ValueError, match=r"no image member.*only the members txt"):
        load_splits(source="webdataset", path=str(tmp_path / "text"))
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar file"):
        load_splits(source="webdataset", path=str(tmp_path / "none"))


# hub


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_keep_their_columns(tmp_path, streaming):
    # A local folder takes the same way through `datasets.load_dataset` as a Hub id.
    write_parquet(tmp_path / "train.parquet", 3)
    write_parquet(tmp_path / "test.parquet", 2)
    splits = load_splits(source="hub", path=str(tmp_path), streaming=streaming)
    assert list(splits) == ["train", "test"]
    first = next(iter(splits["train"]))
    assert first["image"]["bytes"] == NOT_A_PICTURE and first["captions"] == ["train 0 0", "train 0 1"]
    with pytest.raises(ValueError, match=r"data\.train_split 'noisy' is not in .*\['train', 'test'\]"):
        load_splits(source="hub", path=str(tmp_path), train_split="noisy")


def test_hub_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path .*no such data set, or no access to it"):
        load_splits(source="hub", path=str(tmp_path))  # a folder without data files
    write_parquet(tmp_path / "train.parquet", 3)
    with pytest.raises(ValueError, match=r"data\.path .*\(data\.name 'plain'\).*cannot be loaded .*'plain' not found"):
        load_splits(source="hub", path=str(tmp_path), name="plain")


# noise, features, limits


def test_permutation_comes_before_the_cut_and_touches_train_only(tmp_path):
    write_parquet(tmp_path / "train.parquet", 3)
    write_parquet(tmp_path / "test.parquet", 3)
    np.save(tmp_path / "order.npy", np.array([4, 1, 2, 3, 0, 5]))
    splits = load_splits(
        source="folder", path=str(tmp_path), noise_permutation="order.npy", max_train_rows=1, max_eval_rows=2
    )
    assert splits["train"]["captions"] == [["train 2 0", "train 0 1"]]
    assert splits["train"]["clean"] == [[False, True]]
    assert len(splits["test"]) == 2 and "clean" not in splits["test"].column_names


def test_rate_holds_for_what_the_cut_leaves():
    train = load_splits(scenes_train=50, max_train_rows=20, noise_rate=0.4, noise_seed=1, clean_column="truth")[
        "train"
    ]
    assert len(train) == 20 and sum(train["truth"]) == 12
    plain = make_scenes(20)["caption"]
    assert sorted(train["caption"]) == sorted(plain)


def test_image_features_are_float32_rows_in_order(tmp_path):
    write_parquet(tmp_path / "train.parquet", 3)
    write_parquet(tmp_path / "validation.parquet", 2)
    values = {"train": np.arange(12, dtype=np.float16).reshape(3, 4), "validation": np.ones((2, 4))}
    np.savez(tmp_path / "features.npz", **values)
    splits = load_splits(source="folder", path=str(tmp_path), image_features="features.npz", max_train_rows=2)
    assert splits["train"].features["image_features"] == List(Value("float32"), length=4)
    assert splits["train"]["image_features"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert splits["validation"]["image_features"] == [[1] * 4] * 2

    np.savez(tmp_path / "features.npz", train=values["train"])
    with pytest.raises(ValueError, match=r"no array for the split 'validation', only \['train'\]"):
        load_splits(source="folder", path=str(tmp_path), image_features="features.npz")
    np.savez(tmp_path / "features.npz", train=values["train"][:2], validation=values["validation"])
    with pytest.raises(ValueError, match=r"shape \(2, 4\), but the split has 3 rows"):
        load_splits(source="folder", path=str(tmp_path), image_features="features.npz")
    (tmp_path / "features.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"data\.image_features: .* is not a readable \.npz"):
        load_splits(source="folder", path=str(tmp_path), image_features="features.npz")
    with pytest.raises(FileNotFoundError, match=r"data\.image_features: no file"):
        load_splits(source="folder", path=str(tmp_path), image_features="other.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "disk"}, r"data\.source must be one of scenes, hub, .*got 'disk'"),
        ({"source": "folder"}, r"data\.path is missing"),
        ({"path": "pairs"}, r"data\.path is 'pairs', but data\.source is 'scenes'"),
        ({"noise_rate": 0.2, "noise_permutation": "a.npy"}, r"both mismatch captions"),
        ({"noise_rate": 0.2, "streaming": True}, r"data\.noise_rate is 0\.2 with data\.streaming"),
        ({"noise_permutation": "a.npy", "streaming": True}, r"Set data\.streaming to false"),
        ({"image_features": "a.npz", "streaming": True}, r"data\.image_features is 'a\.npz'"),
        ({"noise_rate": 2}, r"data\.noise_rate must be a number between 0 and 1, got 2"),
        (
            {"noise_rate": 0.2, "noise_kind": "near"},
            r"data\.noise_kind must be one of random, neighbours, partial, absent, got",
        ),
        ({"noise_kind": "neighbours"}, r"data\.noise_kind is 'neighbours', but data\.noise_rate is 0"),
        ({"noise_kind": "absent"}, r"data\.noise_kind is 'absent', but data\.noise_rate is 0"),
        ({"noise_kind": "absent", "noise_rate": 0.2, "streaming": True}, r"data\.noise_rate is 0\.2 with"),
        ({"noise_kind": "partial", "noise_permutation": "a.npy"}, r"data\.noise_kind is 'partial', but"),
        ({"noise_kind": "partial", "noise_rate": 0.2, "streaming": True}, r"data\.noise_rate is 0\.2 with"),
        ({"noise_kind": "partial", "noise_rate": 0.2, "text_features": "t.npz"}, r"data\.text_features is 't\.npz'"),
        ({"noise_kind": "neighbours", "noise_rate": 0.2}, r"data\.image_features, or .* data\.noise_permutation"),
        ({"max_train_rows": 0}, r"data\.max_train_rows must be an integer of at least 1, or null for all rows, got 0"),
        ({"scenes_train": 0}, r"data\.scenes_train must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_splits(**arguments)


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k folder is not on this machine")
def test_flickr8k():
    splits = load_splits(
        source="folder",
        path=str(FLICKR8K),
        image_features="mobilenet_v1_features.npz",
        noise_permutation="caption_order_noise40.npy",
        max_eval_rows=100,
    )
    assert sizes(splits) == {"train": 6000, "validation": 100, "test": 100}
    assert np.mean(splits["train"]["clean"]) == 0.6
    assert splits["train"].features["image"] == Image(decode=False)
    with np.load(FLICKR8K / "mobilenet_v1_features.npz") as stored:
        row = splits["train"].with_format("numpy")[77]["image_features"]
        assert np.array_equal(row, stored["train"][77].astype(np.float32))
