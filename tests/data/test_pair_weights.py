"""Weights of pairs from a column: read, checked, and refused by name where they are no weights."""

import decimal
import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from testing import tiny_models
from testing.tar_files import write_tar

from hf_dissect.data import as_pairs, load_splits
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.problems import read_problems
from hf_dissect.data_collator import SelectionCollator


def table(weights, captions=None, **more) -> Dataset:
    pairs = tiny_models.tiny_pairs(len(weights)).select_columns(["image"])
    captions = tiny_models.CAPTIONS[: len(weights)] if captions is None else captions
    return pairs.add_column("caption", captions).add_column("importance", weights, **more)


def collated(pairs) -> dict[str, torch.Tensor]:
    return SelectionCollator(tiny_models.tiny_clip()[1])(list(pairs))


@pytest.mark.parametrize(
    "weights",
    [
        [0.0, 0.5, 3.25],
        [0, 2, 7],
        [decimal.Decimal("0.25"), decimal.Decimal("1.50"), decimal.Decimal("0.00")],
        np.array([1, 0.5, 2], np.float16),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_weight_is_any_number_of_at_least_zero(weights, streaming):
    rows = table(weights)
    pairs = as_pairs(rows.to_iterable_dataset() if streaming else rows, weight="importance")
    assert [float(pair["weight"]) for pair in pairs] == [float(weight) for weight in weights]
    batch = collated(pairs)
    assert batch["given_weight"].tolist() == [float(weight) for weight in weights]
    assert batch["given_weight"].dtype == torch.float32 and not batch["bad_reason"].any()
    assert "weight" not in as_pairs(rows)[0] and "given_weight" not in collated(as_pairs(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_several_captions_has_one_weight_or_one_for_each(streaming):
    captions = [["a", "b"], [], ["c", "d", "e"]]
    for weights, expected in (
        ([1.0, 2.0, 3.0], [1, 1, 0, 3, 3, 3]),
        ([[1.0, 2.0], [], [3.0, 4.0, 5.0]], [1, 2, 0, 3, 4, 5]),
    ):
        rows = table(weights, captions)
        pairs = as_pairs(rows.to_iterable_dataset() if streaming else rows, weight="importance")
        batch = collated(pairs)
        good = batch["bad_reason"] == 0
        assert good.tolist() == [True, True, False, True, True, True]
        assert batch["given_weight"][good].tolist() == [
            weight for weight, row in zip(expected, good, strict=True) if row
        ]
        assert batch["bad_reason"][2] == BadReason.CAPTION_MISSING


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5, -2.0], r"row 1 has weight -0.5, which is negative \(2 such in all\)"),
        ([1.0, 2.0, float("nan")], r"row 2 has weight NaN \(1 such"),
        ([float("inf"), 2.0, 1.0], "row 0 has weight inf, which is too large"),
        ([1.0, 1e300, 1.0], r"row 1 has weight 1e\+300, which is too large"),
        ([1.0, None, 1.0], "row 1 has no weight"),
        ([-3, 1, 2], "row 0 has weight -3, which is negative"),
        (["1", "2", "3"], "holds string; a weight is a finite number of at least 0"),
        ([True, False, True], "holds bool; a weight is a finite number"),
        ([[1.0], [2.0], [3.0]], "holds lists, but a row has one caption"),
    ],
)
def test_what_is_no_weight_is_refused_with_its_row(weights, message):
    with pytest.raises(ValueError, match=f"weight_column='importance'.*{message}"):
        as_pairs(table(weights), weight="importance")


def test_lists_of_weights_are_parallel_to_the_captions():
    captions = [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="row 0 has 1 weights for 2 captions"):
        as_pairs(table([[1.0], [2.0]], captions), weight="importance")
    with pytest.raises(ValueError, match="row 1 has weight -1, which is negative"):
        as_pairs(table([[1.0, 2.0], [-1.0]], captions), weight="importance")
    with pytest.raises(ValueError, match="row 1 has no weight"):
        as_pairs(table([[1.0, 2.0], [None]], captions), weight="importance")


def test_a_missing_column_is_refused():
    rows = table([1.0, 2.0])
    for given in (rows, rows.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match="weight_column='weight': no such column; the data has image, caption, im"
        ):
            as_pairs(given, weight="weight")
    augmented = rows.with_transform(lambda batch: {**batch, "weight": [1.0] * len(batch["image"])})
    with pytest.raises(ValueError, match="weight_column='weight': weights must be columns of the table"):
        as_pairs(augmented, weight="weight")
    kept = rows.with_transform(lambda batch: {"image": batch["image"], "caption": batch["caption"]})
    assert [pair["weight"] for pair in as_pairs(kept, weight="importance")] == [1.0, 2.0]


def test_a_stream_counts_rows_without_a_usable_weight_as_bad():
    values = [1.0, -1.0, float("nan"), None, 0.0, float("inf")]
    rows = table(values).add_column("key", [f"n{row}" for row in range(6)])
    pairs = as_pairs(rows.to_iterable_dataset(), weight="importance", sample_id="key")
    batch = collated(pairs)
    assert batch["bad_reason"].tolist() == [0, 5, 5, 5, 0, 5] and batch["given_weight"].tolist() == [1, 0, 0, 0, 0, 0]
    assert read_problems(batch) == {
        1: "weight -1, which is negative\nn1",
        2: "weight NaN\nn2",
        3: "no weight\nn3",
        5: "weight inf, which is too large\nn5",
    }
    with pytest.raises(ValueError, match="holds string; a weight is"):
        as_pairs(table(["1", "2"]).to_iterable_dataset(), weight="importance")

    def untyped():
        for row, weight in zip(rows, [2, "3", [1.0], True, 0.5, {}], strict=True):
            yield {**row, "importance": weight}

    unknown = datasets.IterableDataset.from_generator(untyped)
    batch = collated(as_pairs(unknown, weight="importance"))
    assert batch["given_weight"].tolist() == [2, 0, 0, 0, 0.5, 0] and batch["bad_reason"].bool().sum() == 4


def test_the_first_row_may_be_the_one_without_a_weight():
    rows = list(as_pairs(table([1.0, 2.0]), weight="importance"))
    del rows[0]["weight"]
    batch = collated(rows)
    assert batch["bad_reason"].tolist() == [5, 0] and batch["given_weight"].tolist() == [0, 2]


# ---- files ----


def test_weights_in_text_files(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(tiny_models.tiny_pairs(1)[0]["image"]["bytes"])
    lines = [f"a.png,caption {row},{weight}" for row, weight in enumerate(["1", "0.5", "0", "2e1"])]
    (tmp_path / "train.csv").write_text("\n".join(["file_name,caption,w", *lines]))
    rows = load_splits(source="folder", path=str(tmp_path), weight_column="w")["train"]
    assert [pair["weight"] for pair in as_pairs(rows, weight="w")] == [1, 0.5, 0, 20]
    (tmp_path / "train.csv").write_text("\n".join(["file_name,caption,w", *lines, "a.png,more,NA"]))
    rows = load_splits(source="folder", path=str(tmp_path), weight_column="w")["train"]
    with pytest.raises(ValueError, match="row 4 has no weight"):
        as_pairs(rows, weight="w")
    (tmp_path / "train.csv").write_text("file_name,caption,w,w\na.png,x,1,2\n")
    with pytest.raises(ValueError, match="'w'|\"w\""):
        load_splits(source="folder", path=str(tmp_path), weight_column="w")


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_in_the_json_of_shards(tmp_path, streaming):
    def write(name, weights):
        members = {}
        for row, weight in enumerate(weights):
            members |= {f"{row:03}.jpg": tiny_models.tiny_pairs(1)[0]["image"]["bytes"]}
            record = {"caption": f"c{row}"} | ({} if weight is None else {"w": weight})
            members |= {f"{row:03}.json": json.dumps(record).encode()}
        write_tar(tmp_path / name, members)

    write("train-0.tar", [1, 0.5, 0])
    write("validation-0.tar", [None, None])  # weights are for training
    settings = {"source": "webdataset", "path": str(tmp_path), "streaming": streaming, "weight_column": "w"}
    splits = load_splits(**settings)
    assert [pair["weight"] for pair in as_pairs(splits["train"], weight="w")] == [1, 0.5, 0]
    assert "weight" not in next(iter(as_pairs(splits["validation"])))
    write("train-0.tar", [1, None, 2.5])
    if streaming:
        write("train-1.tar", [-1, "heavy"])  # behind what is read ahead
        batch = collated(as_pairs(load_splits(**settings)["train"], weight="w"))
        assert batch["bad_reason"].tolist() == [0, 5, 0, 5, 5]
        write("train-0.tar", [1, "heavy"])
        with pytest.raises(ValueError, match="weight_column='w' holds string"):
            as_pairs(load_splits(**settings)["train"], weight="w")
    else:
        with pytest.raises(ValueError, match="Sample '001' of .* has no value 'w'"):
            load_splits(**settings)
    with pytest.raises(ValueError, match="no values in 'missing', which a setting names"):
        load_splits(**{**settings, "weight_column": "missing"})


def test_features_and_types_of_lists():
    features = Features({"image": List(Value("float32")), "caption": Value("string"), "w": Value("uint8")})
    rows = Dataset.from_dict({"image": [[1.0, 2.0]] * 2, "caption": ["a", "b"], "w": [3, 0]}, features=features)
    assert [pair["weight"] for pair in as_pairs(rows, weight="w")] == [3, 0]
