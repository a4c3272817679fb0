"""Captions of images that are left out: how many, from where, and what is refused."""

import io
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, Features, Image, LargeList, List, Value
from PIL import Image as Picture

from hf_dissect import load_splits, make_scenes
from hf_dissect.data import as_pairs, replace_by_absent, shuffle_captions
from hf_dissect.data.same_pictures import number_pictures

FLICKR8K = Path(os.environ.get("HF_DISSECT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "flickr8k"


def make_rows(lengths, **columns):
    """Rows with captions `row/number`, in lists or, for a number, one a row, and their number."""
    if isinstance(lengths, int):
        captions = {"caption": [f"{row}/0" for row in range(lengths)]}
    else:
        captions = {"captions": [[f"{row}/{place}" for place in range(n)] for row, n in enumerate(lengths)]}
    count = lengths if isinstance(lengths, int) else len(lengths)
    return Dataset.from_dict({"row": list(range(count)), **captions, **columns})


def read_pairs(noisy, clean="clean"):
    """Return row and text of each pair, and the truth."""
    several = "captions" in noisy.column_names
    lists = noisy["captions"] if several else [[caption] for caption in noisy["caption"]]
    pairs = [(row, caption) for row, captions in zip(noisy["row"], lists, strict=True) for caption in captions]
    truth = [value for row in noisy[clean] for value in row] if several else list(noisy[clean])
    return pairs, truth


def donor(caption):
    return int(caption.split("/")[0])


def fewest_left_out(num_rows, a_row, rate):
    """The smallest number of rows whose captions suffice for the rate among the captions of the others."""
    return next(out for out in range(num_rows) if a_row * out >= round(rate * a_row * (num_rows - out)))


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.05, 0.2, 0.4, 0.6, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("lengths", [200, 61, (5,) * 60, (3,) * 101])
def test_the_fewest_rows_are_left_out_and_exactly_the_share_is_wrong(lengths, rate):
    dataset = make_rows(lengths)
    a_row = 1 if isinstance(lengths, int) else lengths[0]
    noisy = replace_by_absent(dataset, rate=rate, seed=2)
    pairs, clean = read_pairs(noisy)
    assert len(noisy) == len(dataset) - fewest_left_out(len(dataset), a_row, rate)
    assert clean == [row == donor(caption) for row, caption in pairs]
    assert clean.count(False) == round(rate * len(pairs)) and len(pairs) == a_row * len(noisy)
    assert not {donor(caption) for row, caption in pairs if row != donor(caption)} & set(noisy["row"])
    assert max(Counter(caption for _, caption in pairs).values()) == 1
    assert noisy["row"] == sorted(noisy["row"])


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.61, 1.0])
@pytest.mark.parametrize("lengths", [(1, 4, 0, 2, 3, 5, 3, 2) * 6, (9,) + (1,) * 40, (40, 1) * 9, (0, 0, 2, 2, 0, 1)])
def test_lists_of_different_lengths(lengths, rate):
    noisy = replace_by_absent(make_rows(lengths), rate=rate, seed=1)
    pairs, clean = read_pairs(noisy)
    stays = set(noisy["row"])
    assert clean.count(False) == sum(row != donor(caption) for row, caption in pairs) == round(rate * len(pairs))
    assert not {donor(caption) for row, caption in pairs if row != donor(caption)} & stays
    assert [len(captions) for captions in noisy["captions"]] == [lengths[row] for row in noisy["row"]]
    assert max(Counter(caption for _, caption in pairs).values()) == 1
    left = [row for row in range(len(lengths)) if row not in stays]
    assert all(lengths[row] for row in left)
    for row in left:  # none of them could stay
        given = sum(lengths[other] for other in left) - lengths[row]
        assert given < round(rate * (sum(lengths) - given))


@pytest.mark.parametrize(
    "kind", [List(Value("string")), LargeList(Value("large_string")), List(Value("large_string"))]
)
def test_types_are_kept(kind):
    rows = make_rows((2, 0, 3) * 8).cast_column("captions", kind)
    noisy = replace_by_absent(rows, rate=0.4)
    assert noisy.features["captions"] == kind and noisy.features["clean"] == List(Value("bool"))
    pairs, clean = read_pairs(noisy)
    assert clean.count(False) == round(0.4 * len(pairs))


def test_the_seed_decides():
    rows = make_rows((5,) * 60)
    first, second, other = (replace_by_absent(rows, rate=0.4, seed=seed).to_dict() for seed in (7, 7, 8))
    assert first == second and first["captions"] != other["captions"] and first["row"] != other["row"]


def test_the_rows_that_go_and_the_captions_that_are_replaced_are_spread():
    noisy = replace_by_absent(make_rows((5,) * 2000), rate=0.4)
    _, clean = read_pairs(noisy)
    wrong = np.array(clean).reshape(-1, 5)
    assert ~wrong == pytest.approx(np.zeros_like(wrong, float), abs=1) and (~wrong).mean(0) == pytest.approx(
        0.4, abs=0.06
    )
    assert np.mean(noisy["row"]) == pytest.approx(999.5, abs=40)


# the same picture


def png(colour):
    buffer = io.BytesIO()
    Picture.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture_columns(numbers):
    """The same pictures in all forms that a column of images may have."""
    files = [{"bytes": png((number, 0, 0)), "path": None} for number in numbers]
    paths = [f"p/{number}.png" for number in numbers]
    vectors = [[float(number), 1.0, -2.0] for number in numbers]
    return {
        "image": (files, Image(decode=False)),
        "jpg": (files, Image()),
        "img": ([file["bytes"] for file in files], Value("binary")),
        "image_path": (paths, Value("string")),
        "filepath": ([{"bytes": None, "path": path} for path in paths], Image(decode=False)),
        "image_features": (vectors, List(Value("float32"), length=3)),
        "vectors": (vectors, List(Value("float64"))),
        "pixels": ([[[number, 1], [2, 3]] for number in numbers], Array2D((2, 2), "uint8")),
    }


@pytest.mark.parametrize("column", list(picture_columns([0])))
def test_a_picture_goes_with_all_of_its_rows(column):
    """Each picture in five rows with a caption each, in any order, as data sets of single captions have them."""
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 5))
    values, kind = picture_columns(numbers.tolist())[column]
    rows = make_rows(200)
    rows = rows.add_column(column, pa.array(values, Features({column: kind}).arrow_schema.field(0).type), feature=kind)
    assert Counter(Counter(number_pictures(rows, column).tolist()).values()) == {5: 40}
    noisy = replace_by_absent(rows, rate=0.4, image_column=column)
    pairs, clean = read_pairs(noisy)
    stays = set(numbers[list(noisy["row"])].tolist())
    assert len(noisy) == 140 and clean.count(False) == 56  # 12 pictures have 60 captions; 11 would have 55 for 58
    assert all((numbers[donor(caption)] in stays) == truth for (_, caption), truth in zip(pairs, clean, strict=True))


def test_a_picture_that_most_rows_show_stays():
    """A placeholder has more captions than are needed, and the other pictures suffice."""
    rows = make_rows(100, image_path=["none.png"] * 50 + [f"{number}.png" for number in range(50)])
    for seed in range(5):
        noisy = replace_by_absent(rows, rate=0.4, seed=seed)
        assert len(noisy) == 71 and set(noisy["row"]) >= set(range(50))


def test_rows_without_a_picture_are_pictures_of_their_own():
    nan = float("nan")
    vectors = [[1.0, 2.0], None, [], [nan, 1.0], [nan, 1.0], [1.0, 2.0], [2.0, 1.0], None]
    rows = Dataset.from_dict({"image_features": vectors, "image": [None] * 8})
    assert number_pictures(rows).tolist() == [0, 1, 2, 3, 4, 0, 5, 6]
    assert number_pictures(rows.remove_columns("image_features")).tolist() == list(range(8))
    assert number_pictures(Dataset.from_dict({"caption": ["a", "b"]})).tolist() == [0, 1]
    assert number_pictures(rows.select([])).tolist() == []


def test_equal_files_or_equal_features_are_enough():
    """Features of one picture may differ in their last digits, and two files may have the same features."""
    files = [{"bytes": png((number, 0, 0)), "path": None} for number in (0, 0, 1, 2, 3, 4)]
    rows = Dataset.from_dict({"image": files}, features=Features({"image": Image(decode=False)}))
    rows = rows.add_column("image_features", [[0.0], [0.1], [0.1], [5.0], [6.0], [5.0]])
    assert number_pictures(rows).tolist() == [0, 0, 0, 1, 2, 1]


# the same caption


def test_a_caption_that_an_image_that_stays_also_has_is_not_used():
    captions = [["a dog runs", f"{row}"] if row % 3 else [f"{row}/1", f"{row % 20}"] for row in range(120)]
    rows = Dataset.from_dict({"captions": captions, "row": list(range(120))})
    for seed in range(5):
        noisy = replace_by_absent(rows, rate=0.4, seed=seed)
        known = set(itertools.chain(*(captions[row] for row in noisy["row"])))
        wrong = [
            caption
            for row, found, clean in zip(noisy["row"], noisy["captions"], noisy["clean"], strict=True)
            for caption, truth in zip(found, clean, strict=True)
            if caption not in captions[row] or not truth
        ]
        assert len(wrong) == round(0.4 * 2 * len(noisy)) and not set(wrong) & known


@pytest.mark.parametrize(("classes", "rate", "stays"), [(4, 0.5, 61), (10, 0.4, 85), (10, 0.2, 96), (60, 0.4, 86)])
def test_classes_with_one_caption_each_are_left_out_as_a_whole(classes, rate, stays):
    """Rows of a class that gives nothing are left out where the share among fewer pairs is within reach."""
    labels = np.arange(120) % classes
    rows = Dataset.from_dict({"caption": [f"a photo of {label}" for label in labels], "row": list(range(120))})
    noisy = replace_by_absent(rows, rate=rate, seed=1)
    present = {int(labels[row]) for row in noisy["row"]}
    wrong = [caption for caption in noisy["caption"] if int(caption.split()[-1]) not in present]
    assert len(wrong) == noisy["clean"].count(False) == round(rate * len(noisy))
    assert stays - 1 <= len(noisy) <= stays + 1


def test_missing_captions_are_not_given_away():
    captions = [[f"{row}/0", None, ""] if row % 2 else [f"{row}/0", f"{row}/1"] for row in range(60)]
    captions += [[None], [" "]] * 5
    rows = Dataset.from_dict({"captions": captions, "row": list(range(70))})
    noisy = replace_by_absent(rows, rate=0.3)
    pairs, clean = read_pairs(noisy)
    wrong = [caption for (_, caption), truth in zip(pairs, clean, strict=True) if not truth]
    assert len(wrong) == round(0.3 * len(pairs)) and all(map(str.strip, wrong))
    assert set(noisy["row"]) >= set(range(60, 70))


# other columns


def test_the_truth_that_is_there_is_kept_and_wrong_captions_are_not_given_away():
    """Half of the captions were exchanged before: their true images may stay."""
    before = shuffle_captions(make_rows((2,) * 100), rate=0.3, clean_column="truth")
    noisy = replace_by_absent(before, rate=0.2, clean_column="truth")
    pairs, truth = read_pairs(noisy, "truth")
    stays, known = (
        set(noisy["row"]),
        {row: value for row, value in zip(before["row"], before["captions"], strict=True)},
    )
    assert truth == [row == donor(caption) for row, caption in pairs]
    replaced = [caption for row, caption in pairs if caption not in known[row]]
    assert len(replaced) == round(0.2 * len(pairs)) and not {donor(caption) for caption in replaced} & stays
    with pytest.raises(ValueError, match="one bool per caption"):
        replace_by_absent(make_rows((2,) * 9).add_column("clean", [True] * 9), rate=0.2)
    kept = make_rows((2,) * 9).add_column("clean", ["text"] * 9)  # captions that somebody cleaned
    noisy = replace_by_absent(kept, rate=0.2)
    assert noisy["clean"] == ["text"] * len(noisy) and "is_clean" in noisy.column_names


@pytest.mark.parametrize("lengths", [40, (2, 0, 3, 1) * 10])
def test_stored_features_follow_their_captions(lengths):
    rows = make_rows(lengths)

    def vector(caption):
        return [float(value) for value in caption.split("/")]

    several = "captions" in rows.column_names
    texts = rows["captions"] if several else rows["caption"]
    values = [list(map(vector, text)) if several else vector(text) for text in texts]
    kind = List(Value("float32"), length=2)
    kind = List(kind) if several else kind
    noisy = replace_by_absent(rows.add_column("text_features", values, feature=kind), rate=0.4)
    assert False in read_pairs(noisy)[1] and noisy.features["text_features"] == kind
    texts = noisy["captions"] if several else noisy["caption"]
    expected = [list(map(vector, text)) if several else vector(text) for text in texts]
    assert noisy["text_features"] == expected


def test_pictures_are_shared_and_other_columns_stay():
    scenes = make_scenes(60)
    rows = scenes.add_column("id", [f"k{number}" for number in range(60)])
    noisy = replace_by_absent(rows, rate=0.4)
    assert noisy.column_names == [*rows.column_names, "clean"]
    numbers = [int(key[1:]) for key in noisy["id"]]
    assert noisy["image"] == [scenes[number]["image"] for number in numbers] and len(noisy) == 43
    addresses = [table.data["image"].chunk(0).field("bytes").buffers()[2].address for table in (rows, noisy)]
    assert addresses[0] == addresses[1]  # not copied
    pairs = as_pairs(noisy, sample_id="id")
    assert [pair["key"] for pair in pairs.__getitems__(range(len(pairs)))] == noisy["id"]


def test_rows_that_were_selected_before():
    rows = make_rows((3,) * 50).select(list(range(49, -1, -2)))
    noisy = replace_by_absent(rows, rate=0.5)
    pairs, clean = read_pairs(noisy)
    assert clean == [row == donor(caption) for row, caption in pairs] and clean.count(False) == round(0.5 * len(pairs))
    assert noisy["row"] == sorted(noisy["row"], reverse=True) and set(noisy["row"]) <= set(rows["row"])


# refusals


@pytest.mark.parametrize(
    ("columns", "rate"),
    [
        ({"caption": ["a", "b"]}, 0.5),
        ({"caption": ["same"] * 6}, 0.5),
        ({"caption": [None, "", "a", None]}, 0.5),
        ({"caption": list("abcdefgh"), "image_path": ["one.png"] * 8}, 0.4),
        ({"caption": list("abcdefgh"), "clean": [False] * 8}, 0.4),
        ({"captions": np.random.default_rng(0).choice(list("abcdefgh"), (90, 3)).tolist()}, 0.4),
    ],
)
def test_impossible_rates_are_refused(columns, rate):
    with pytest.raises(ValueError, match=r"noise_rate.*noise_kind: absent.*noise_kind random"):
        replace_by_absent(Dataset.from_dict(columns), rate=rate)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.4", True])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match=r"noise_rate.*between 0 and 1"):
        replace_by_absent(make_rows(10), rate=rate)


def test_empty_data_and_no_noise():
    rows = make_rows(6)
    noisy = replace_by_absent(rows, rate=0.0)
    assert noisy["caption"] == rows["caption"] and noisy["clean"] == [True] * 6
    assert len(replace_by_absent(rows.select([]), rate=0.4)) == 0
    assert len(replace_by_absent(make_rows((1, 0, 0)).select([1, 2]), rate=0.4)) == 2


# through the settings


def test_through_a_recipe_only_the_train_split_changes_after_the_cut(tmp_path):
    for split, count in (("train", 60), ("validation", 6)):
        make_rows((2,) * count).to_parquet(tmp_path / f"{split}.parquet")
    arrays = {"train": np.arange(60.0)[:, None], "validation": np.arange(6.0)[:, None]}
    np.savez(tmp_path / "images.npz", **arrays)
    np.savez(tmp_path / "texts.npz", train=np.arange(120.0)[:, None], validation=np.arange(12.0)[:, None])
    given = {"source": "folder", "path": str(tmp_path), "image_features": "images.npz", "text_features": "texts.npz"}
    splits = load_splits(**given, max_train_rows=35, noise_rate=0.4, noise_kind="absent", noise_seed=3)
    pairs, clean = read_pairs(splits["train"])
    train = splits["train"]
    assert len(train) == 25 and clean.count(False) == 20 and max(donor(caption) for _, caption in pairs) < 35
    assert train["image_features"] == [[float(row)] for row in train["row"]]
    number = [[[2.0 * donor(text) + int(text[-1])] for text in captions] for captions in train["captions"]]
    assert train["text_features"] == number
    assert len(splits["validation"]) == 6 and "clean" not in splits["validation"].column_names


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k folder is not on this machine")
@pytest.mark.parametrize(("rate", "fewest"), [(0.4, 1715), (0.6, 2250)])
def test_flickr8k(rate, fewest):
    """Some captions occur several times, which costs a few rows more."""
    given = {"source": "folder", "path": str(FLICKR8K), "image_features": "mobilenet_v1_features.npz"}
    rows = load_splits(**given, validation_split=None, test_split=None)["train"]
    noisy = replace_by_absent(rows, rate=rate)
    assert fewest <= 6000 - len(noisy) <= 1.02 * fewest
    clean = np.array(noisy["clean"])
    assert (~clean).sum() == round(rate * 5 * len(noisy))
    own = dict(zip(rows["image_id"], rows["captions"], strict=True))
    present = {caption for name in noisy["image_id"] for caption in own[name]}
    wrong = [
        caption for caption, truth in zip(itertools.chain(*noisy["captions"]), clean.ravel(), strict=True) if not truth
    ]
    assert not set(wrong) & present
