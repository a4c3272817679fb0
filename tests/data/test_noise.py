import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from hf_dissect.data.noise import apply_caption_order, load_caption_order, shuffle_captions

REAL_DATA = Path(os.environ.get("HF_DISSECT_DATA", Path(__file__).parents[3] / "shared" / "data"))
FLICKR8K = REAL_DATA / "flickr8k"


def scalar_dataset(num_rows=40):
    return Dataset.from_dict({"caption": [f"caption {i}" for i in range(num_rows)], "row": list(range(num_rows))})


def list_dataset(lengths=(5, 5, 5, 5, 5, 5, 5, 5)):
    return Dataset.from_dict({"captions": [[f"{row}/{j}" for j in range(n)] for row, n in enumerate(lengths)]})


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4, 0.99, 1.0])
def test_exactly_the_rate_of_scalar_captions_comes_from_another_row(rate):
    noisy = shuffle_captions(scalar_dataset(), rate=rate, seed=3)
    moved = [caption != f"caption {row}" for caption, row in zip(noisy["caption"], noisy["row"], strict=True)]
    assert sum(moved) == round(rate * 40)
    assert noisy["clean"] == [not m for m in moved]
    assert sorted(noisy["caption"]) == sorted(scalar_dataset()["caption"])
    assert noisy["row"] == list(range(40))


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [(5,) * 8, (1, 4, 0, 2, 3, 5)])
def test_exactly_the_rate_of_listed_captions_comes_from_another_row(rate, lengths):
    noisy = shuffle_captions(list_dataset(lengths), rate=rate, seed=1)
    num_pairs = sum(lengths)
    assert [len(row) for row in noisy["captions"]] == list(lengths)
    foreign = [[not c.startswith(f"{row}/") for c in captions] for row, captions in enumerate(noisy["captions"])]
    assert sum(flat(foreign)) == round(rate * num_pairs)
    assert noisy["clean"] == [[not f for f in row] for row in foreign]
    assert Counter(flat(noisy["captions"])) == Counter(flat(list_dataset(lengths)["captions"]))


def test_two_rows_with_many_captions_exchange_all_of_them():
    noisy = shuffle_captions(list_dataset((60, 60)), rate=1.0)
    assert all(c.startswith("1/") for c in noisy[0]["captions"])
    assert all(c.startswith("0/") for c in noisy[1]["captions"])


def test_same_seed_same_noise():
    first, second, other = (shuffle_captions(scalar_dataset(), rate=0.5, seed=seed) for seed in (7, 7, 8))
    assert first["caption"] == second["caption"]
    assert first["caption"] != other["caption"]


def test_a_missing_caption_moves_like_any_other():
    dataset = Dataset.from_dict({"text": ["a", None, "c"]})
    noisy = shuffle_captions(dataset, rate=1.0)
    assert set(noisy["text"]) == {"a", None, "c"}
    assert noisy["clean"] == [False] * 3


def test_impossible_exchange_says_so():
    with pytest.raises(ValueError, match="1 of 2 pairs cannot all receive"):
        shuffle_captions(Dataset.from_dict({"caption": ["a", "b"]}), rate=0.5)
    with pytest.raises(ValueError, match="5 of 5 pairs cannot all receive"):
        shuffle_captions(list_dataset((4, 1)), rate=1.0)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.4", True, None])
def test_bad_rate(rate):
    with pytest.raises(ValueError, match="noise_rate.*between 0 and 1"):
        shuffle_captions(scalar_dataset(), rate=rate)


def test_bad_seed_and_columns():
    with pytest.raises(ValueError, match="noise_seed"):
        shuffle_captions(scalar_dataset(), rate=0.1, seed=-1)
    with pytest.raises(ValueError, match=r"caption_column: 'title' names no column.*\['caption', 'row'\]"):
        shuffle_captions(scalar_dataset(), rate=0.1, caption_column="title")
    with pytest.raises(ValueError, match="'row' holds"):
        shuffle_captions(scalar_dataset(), rate=0.1, caption_column="row")
    streaming = IterableDataset.from_generator(lambda: iter([{"caption": "a"}]))
    with pytest.raises(ValueError, match="streaming=False"):
        shuffle_captions(streaming, rate=0.1)


def test_order_is_applied_row_major_and_a_move_within_a_row_stays_clean():
    order = np.array([1, 0, 4, 3, 5, 2])
    noisy = apply_caption_order(list_dataset((2, 2, 2)), order)
    assert noisy["captions"] == [["0/1", "0/0"], ["2/0", "1/1"], ["2/1", "1/0"]]
    assert noisy["clean"] == [[True, True], [False, True], [True, False]]


def test_known_mismatches_stay_mismatched():
    dataset = Dataset.from_dict({"captions": [["0/0", "0/1"], ["1/0", "1/1"]], "truth": [[True, False], [True, True]]})
    noisy = apply_caption_order(dataset, np.array([1, 2, 0, 3]), clean_column="truth")
    assert noisy["truth"] == [[False, False], [False, True]]
    with pytest.raises(ValueError, match="one bool per caption"):
        apply_caption_order(dataset.remove_columns("truth").add_column("clean", [True, True]), np.arange(4))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2], r"the dataset has 4 pairs"),
        ([0, 1, 2, 4], r"names pair 4 at position 3"),
        ([-1, 1, 2, 3], r"names pair -1 at position 0"),
        ([0, 1, 1, 3], r"pair 1 occurs more than once"),
        ([0.0, 1.0, 2.0, 3.0], r"integer array of shape \(4,\)"),
    ],
)
def test_bad_order(order, message):
    with pytest.raises(ValueError, match=message):
        apply_caption_order(list_dataset((2, 2)), np.array(order))


def test_order_file(tmp_path):
    path = tmp_path / "order.npy"
    with pytest.raises(FileNotFoundError, match="noise_permutation"):
        load_caption_order(path)
    np.save(path, np.array([2, 0, 1], dtype=np.int32))
    assert load_caption_order(path).tolist() == [2, 0, 1]
    np.save(path, np.array([0.5]))
    with pytest.raises(ValueError, match="one integer array"):
        load_caption_order(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a readable"):
        load_caption_order(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable"):
        load_caption_order(path)


def test_images_and_columns_are_left_alone():
    features = Features({"image": Image(decode=False), "captions": List(Value("string")), "id": Value("int64")})
    rows = {
        "image": [{"bytes": b"no picture", "path": None}] * 4,
        "captions": [["a"], ["b"], ["c"], ["d"]],
        "id": [9, 8, 7, 6],
    }
    dataset = Dataset.from_dict(rows, features=features).select([3, 1, 0])
    noisy = shuffle_captions(dataset, rate=1.0)
    assert noisy.column_names == ["image", "captions", "id", "clean"]
    assert noisy.features["image"] == Image(decode=False)
    assert noisy["id"] == [6, 8, 9]
    assert noisy[0]["image"]["bytes"] == b"no picture"


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k folder is not on this machine")
def test_flickr8k_permutation_mismatches_exactly_40_percent_quickly(tmp_path):
    train = Dataset.from_parquet(str(FLICKR8K / "train.parquet"), cache_dir=str(tmp_path))
    order = load_caption_order(FLICKR8K / "caption_order_noise40.npy")
    start = time.perf_counter()
    noisy = apply_caption_order(train, order)
    shuffled = shuffle_captions(train, rate=0.4)
    assert time.perf_counter() - start < 2.0
    clean = np.array(noisy["clean"])
    assert clean.shape == (6000, 5)
    assert (~clean).sum() == 12000
    assert (~np.array(shuffled["clean"])).sum() == 12000
    captions = flat(train["captions"])
    assert noisy[17]["captions"] == [captions[order[pair]] for pair in range(85, 90)]
