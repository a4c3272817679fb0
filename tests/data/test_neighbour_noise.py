"""Captions exchanged between images that look alike: how many, between whom, and what is refused."""

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_dissect import load_splits
from hf_dissect.data import exchange_between_neighbours, neighbour_noise, shuffle_captions

FLICKR8K = Path(os.environ.get("HF_DISSECT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "flickr8k"


def make_rows(lengths, dim=6, seed=0, column="image_features", groups=None):
    """Rows of random features around ten centres, with captions `row/number`, in lists or, for None, one a row."""
    rng = np.random.default_rng(seed)
    count = lengths if isinstance(lengths, int) else len(lengths)
    groups = np.arange(count) % 10 if groups is None else groups
    vectors = rng.normal(size=(10, dim))[groups] + 0.2 * rng.normal(size=(count, dim))
    captions = (
        {"caption": [f"{row}/0" for row in range(count)]}
        if isinstance(lengths, int)
        else {"captions": [[f"{row}/{number}" for number in range(n)] for row, n in enumerate(lengths)]}
    )
    return Dataset.from_dict({column: vectors.astype(np.float32).tolist(), **captions})


def read_donors(noisy):
    """Return the row of each pair and that of its caption, and the truth."""
    several = "captions" in noisy.column_names
    lists = noisy["captions"] if several else [[caption] for caption in noisy["caption"]]
    pairs = [(row, int(caption.split("/")[0])) for row, captions in enumerate(lists) for caption in captions]
    clean = [value for row in noisy["clean"] for value in row] if several else list(noisy["clean"])
    return *np.array(pairs).T, np.array(clean)


def mean_cosine(dataset, receiver, donor):
    vectors = np.array(dataset["image_features"])
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = receiver != donor
    return (vectors[receiver[moved]] * vectors[donor[moved]]).sum(1).mean()


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4, 0.61, 0.99, 1.0])
@pytest.mark.parametrize("lengths", [200, 201, (5,) * 60, (1, 4, 0, 2, 3, 5, 3, 2) * 6, (9,) + (1,) * 40, (40, 1) * 9])
def test_exactly_the_share_is_wrong_and_each_caption_is_used_once(lengths, rate):
    dataset = make_rows(lengths)
    num_pairs = lengths if isinstance(lengths, int) else sum(lengths)
    if isinstance(lengths, tuple) and 2 * max(lengths) > num_pairs:
        return
    noisy = exchange_between_neighbours(dataset, rate=rate, seed=2)
    receiver, donor, clean = read_donors(noisy)
    assert (receiver != donor).sum() == (~clean).sum() == round(rate * num_pairs)
    assert ((receiver == donor) == clean).all()
    name = "caption" if isinstance(lengths, int) else "captions"
    flatten = (lambda values: values) if isinstance(lengths, int) else (lambda rows: [v for row in rows for v in row])
    assert Counter(flatten(list(noisy[name]))) == Counter(flatten(list(dataset[name])))
    assert noisy["image_features"] == dataset["image_features"]


def test_donors_are_near_and_random_ones_are_not():
    dataset = make_rows((5,) * 200)
    near = mean_cosine(dataset, *read_donors(exchange_between_neighbours(dataset, rate=0.4))[:2])
    far = mean_cosine(dataset, *read_donors(shuffle_captions(dataset, rate=0.4))[:2])
    assert near > 0.9 and abs(far) < 0.1


def test_the_wrong_captions_are_spread_over_the_rows():
    receiver, donor, _ = read_donors(exchange_between_neighbours(make_rows((5,) * 100), rate=0.4))
    assert Counter(np.bincount(receiver[receiver != donor], minlength=100).tolist()).most_common(1)[0][0] == 2
    assert np.bincount(receiver[receiver != donor], minlength=100).max() <= 3


def test_the_seed_decides():
    dataset = make_rows((5,) * 60)
    first, second, other = (exchange_between_neighbours(dataset, rate=0.4, seed=s)["captions"] for s in (7, 7, 8))
    assert list(first) == list(second) and list(first) != list(other)


def test_rows_with_the_same_picture_do_not_exchange_captions():
    """A picture that is in the data five times, with a caption each."""
    features = np.repeat(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32), 5, axis=0)
    captions = [f"{row}/0" for row in range(200)]
    noisy = exchange_between_neighbours(Dataset.from_dict({"image_features": features, "caption": captions}), rate=0.6)
    receiver, donor, clean = read_donors(noisy)
    assert (receiver[~clean] // 5 != donor[~clean] // 5).all() and (~clean).sum() == 120


def test_a_row_never_gets_a_text_that_it_has():
    """Class folders: the nearest rows are those of the same class, which have the same caption."""
    groups = np.arange(120) % 4
    rows = make_rows(120, groups=groups).remove_columns("caption").add_column("caption", [f"a {g}" for g in groups])
    noisy = exchange_between_neighbours(rows, rate=0.5)
    wrong = [caption != f"a {group}" for caption, group in zip(noisy["caption"], groups, strict=True)]
    assert sum(wrong) == 60 and noisy["clean"] == [not value for value in wrong]
    lists = [[f"{row}", "shared"] for row in range(40)]
    noisy = exchange_between_neighbours(
        make_rows(40).add_column("captions", lists), rate=0.4, caption_column="captions"
    )
    assert all(set(row) != {"shared"} and row.count("shared") <= 1 for row in noisy["captions"])
    assert sum(not value for row in noisy["clean"] for value in row) == 32


def test_rows_without_usable_features_keep_their_captions():
    dataset = make_rows(40)
    features = [row if number % 8 else None for number, row in enumerate(dataset["image_features"])]
    features[3] = [float("nan")] * 6
    features[4] = [1.0, 2.0]
    bad = {0, 8, 16, 24, 32, 3, 4}
    rows = Dataset.from_dict({"image_features": features, "caption": dataset["caption"]})
    receiver, donor, _ = read_donors(exchange_between_neighbours(rows, rate=0.8))
    moved = receiver != donor
    assert moved.sum() == 32 and not bad & {*receiver[moved].tolist(), *donor[moved].tolist()}
    with pytest.raises(ValueError, match=r"noise_rate.*only 3\d of the 40 captions .*no usable features"):
        exchange_between_neighbours(rows, rate=1.0)


def test_neighbours_are_looked_for_in_parts_of_large_data(monkeypatch):
    monkeypatch.setattr(neighbour_noise, "_MOST_TOGETHER", 50)
    monkeypatch.setattr(neighbour_noise, "_BLOCK", 7)
    monkeypatch.setattr(neighbour_noise, "_NEAREST", 3)
    dataset = make_rows((2,) * 330)
    receiver, donor, clean = read_donors(exchange_between_neighbours(dataset, rate=0.4))
    assert (~clean).sum() == 264 and mean_cosine(dataset, receiver, donor) > 0.8


def test_features_may_be_the_images_of_a_table():
    for column, named in (("image", None), ("vector", "vector")):
        rows = make_rows(40, column=column)
        assert exchange_between_neighbours(rows, rate=0.5, image_column=named)["clean"].count(False) == 20
    pictures = Dataset.from_dict({"image": ["a.png", "b.png"], "caption": ["a", "b"]})
    with pytest.raises(
        ValueError, match=r"data\.noise_kind.*columns: image, caption.*data\.image_features.*permutation"
    ):
        exchange_between_neighbours(pictures, rate=0.5)


@pytest.mark.parametrize(
    ("captions", "rate", "message"),
    [
        (["a", "b"], 0.5, "only 0 of the 1 captions"),
        (["same"] * 6, 0.5, "only 0 of the 3 captions"),
        (["a", "b"], 1.5, "between 0 and 1"),
    ],
)
def test_impossible_exchanges_say_so(captions, rate, message):
    features = np.random.default_rng(0).normal(size=(len(captions), 4)).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        exchange_between_neighbours(Dataset.from_dict({"image_features": features, "caption": captions}), rate=rate)


def test_empty_data_and_no_noise():
    rows = make_rows(6)
    assert exchange_between_neighbours(rows, rate=0.0)["caption"] == rows["caption"]
    assert len(exchange_between_neighbours(rows.select([]), rate=0.4)) == 0


def test_through_a_recipe_the_first_rows_are_kept_before(tmp_path):
    for split, count in (("train", 60), ("validation", 6)):
        make_rows(count).remove_columns("image_features").to_parquet(tmp_path / f"{split}.parquet")
    arrays = {"train": make_rows(60)["image_features"], "validation": make_rows(6)["image_features"]}
    np.savez(tmp_path / "f.npz", **{name: np.array(rows, np.float32) for name, rows in arrays.items()})
    given = {"source": "folder", "path": str(tmp_path), "image_features": "f.npz", "max_train_rows": 30}
    splits = load_splits(**given, noise_rate=0.4, noise_kind="neighbours", noise_seed=3)
    receiver, donor, clean = read_donors(splits["train"])
    assert len(clean) == 30 and (~clean).sum() == 12 and donor.max() < 30
    assert "clean" not in splits["validation"].column_names


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k folder is not on this machine")
def test_flickr8k_agrees_with_the_fixed_order():
    """The cosines of the fixed order: mean 0.422, 5 % below 0.279, half below 0.415, 95 % below 0.588."""
    given = {"source": "folder", "path": str(FLICKR8K), "image_features": "mobilenet_v1_features.npz"}
    rows = load_splits(**given)["train"].select_columns(["captions", "image_features"])
    start = time.perf_counter()
    noisy = exchange_between_neighbours(rows, rate=0.4)
    assert time.perf_counter() - start < 20
    vectors = rows.with_format("numpy")["image_features"][:]
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row_of_text = {}
    for row, captions in enumerate(rows["captions"]):
        row_of_text |= dict.fromkeys(captions, row)
    flat = [(row, row_of_text[text]) for row, captions in enumerate(noisy["captions"]) for text in captions]
    clean = np.array(noisy["clean"])
    receiver, donor = np.array(flat).T[:, ~clean.ravel()]
    cosine = (vectors[receiver] * vectors[donor]).sum(1)
    order = np.load(FLICKR8K / "caption_order_neighbours40.npy")
    wrong = order // 5 != np.arange(30_000) // 5
    fixed = (vectors[np.flatnonzero(wrong) // 5] * vectors[order[wrong] // 5]).sum(1)
    assert (~clean).sum() == wrong.sum() == 12_000
    assert (~clean).sum(1).min() >= 1 and (~clean).sum(1).max() <= 3
    assert cosine.mean() == pytest.approx(fixed.mean(), abs=0.02)
    assert np.percentile(cosine, [5, 50, 95]) == pytest.approx(np.percentile(fixed, [5, 50, 95]), abs=0.02)
