"""Stored features of captions: laid out like the captions, exchanged with them, refused where they do not fit."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_dissect.data import as_pairs, load_splits
from hf_dissect.data.bad_rows import BadReason
from hf_dissect.data.stored_features import find_feature_sizes
from hf_dissect.data_collator import SelectionCollator

LISTS = [["a", "b"], ["c"], [], ["d", "e", "f"], None, ["g"]]
DIM = 3


def write(folder, captions, features, name: str = "captions") -> dict:
    rows = {"image_features": [[float(row), 0.5] for row in range(len(captions))], name: captions}
    Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    np.savez(folder / "text.npz", train=features)
    return {"source": "folder", "path": str(folder), "text_features": "text.npz"}


def number(count: int) -> np.ndarray:
    """Features of caption i: i, i + 0.25, i + 0.5."""
    return np.arange(count)[:, None] + np.array([0, 0.25, 0.5])


def test_a_row_of_the_array_belongs_to_each_caption_of_a_list(tmp_path):
    pairs = as_pairs(load_splits(**write(tmp_path, LISTS, number(7)))["train"])
    captions = [pair["caption"] for pair in pairs]
    assert captions == ["a", "b", "c", None, "d", "e", "f", None, "g"]
    found = [None if pair["text_features"] is None else pair["text_features"].tolist() for pair in pairs]
    expected = iter(number(7).tolist())
    assert found == [None if caption is None else next(expected) for caption in captions]
    assert find_feature_sizes(pairs) == {"vision": 2, "text": DIM}


def test_a_row_of_the_array_belongs_to_each_single_caption(tmp_path):
    pairs = as_pairs(load_splits(**write(tmp_path, ["a", None, "c"], number(3), name="text"))["train"])
    assert [pair["text_features"].tolist() for pair in pairs] == number(3).tolist()
    assert pairs[1]["caption"] is None


@pytest.mark.parametrize("captions", [[["a", "b"], ["c"], ["d", "e"], ["f"]], list("abcdef")])
def test_exchanged_captions_take_their_features_along(captions, tmp_path):
    settings = write(tmp_path, captions, number(6))
    order = np.array([2, 1, 0, 5, 4, 3])
    np.save(tmp_path / "order.npy", order)
    for noise in ({"noise_permutation": "order.npy"}, {"noise_rate": 0.9}):
        pairs = as_pairs(load_splits(**settings, **noise)["train"])
        assert [pair["text_features"][0] for pair in pairs] == ["abcdef".index(pair["caption"]) for pair in pairs]
        assert [pair["caption"] for pair in pairs] != list("abcdef")
    assert len(as_pairs(load_splits(**settings, max_train_rows=2)["train"])) == (3 if captions[0] != "a" else 2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            number(6),
            r"array 'train' of .*text.npz' is float64 of shape .6, 3., but the split has 7 captions in 6 rows",
        ),
        (number(7)[:, 0], r"of shape .7,., but the split has 7 captions"),
        (np.array([["x"] * 3] * 7), "it must be numbers of shape .7, dim."),
    ],
)
def test_an_array_that_does_not_fit_the_captions_is_refused(array, message, tmp_path):
    with pytest.raises(ValueError, match=f"data.text_features: .*{message}"):
        load_splits(**write(tmp_path, LISTS, array))


def test_files_and_columns_that_are_missing_are_refused(tmp_path):
    settings = write(tmp_path, LISTS, number(7), name="words")
    with pytest.raises(
        ValueError, match="data.text_features: split 'train' has no column of captions, only image_fea"
    ):
        load_splits(**settings)
    assert "text_features" in load_splits(**settings, caption_column="words")["train"].column_names
    with pytest.raises(FileNotFoundError, match="data.text_features: no file at 'other.npz'"):
        load_splits(**{**settings, "text_features": "other.npz"})
    with pytest.raises(ValueError, match="data.text_features is 'text.npz' with data.streaming"):
        load_splits(**settings, streaming=True)


def collate(rows, dim: int = DIM) -> dict:
    return SelectionCollator(None, text_feature_size=dim)(rows)


def make_rows(features) -> list[dict]:
    return [
        {"image": np.ones(2), "caption": f"caption {row}", "sample_id": row, "text_features": vector}
        for row, vector in enumerate(features)
    ]


def test_a_batch_has_features_in_place_of_tokens():
    batch = collate(make_rows(number(4)))
    assert torch.equal(batch["text_features"], torch.tensor(number(4), dtype=torch.float32))
    assert "input_ids" not in batch and batch["bad_reason"].tolist() == [BadReason.GOOD] * 4
    repeated = collate(make_rows([number(4)[1], number(4)[0], number(4)[1]]))["caption_key"].tolist()
    assert repeated[0] == repeated[2] != repeated[1]


def test_features_that_cannot_be_used_are_bad_rows():
    batch = collate(make_rows([number(1)[0], None, [0, np.nan, 0], [0, np.inf, 0]]))
    assert batch["bad_reason"].tolist() == [BadReason.GOOD] + [BadReason.CAPTION_MISSING] * 3
    assert torch.equal(batch["text_features"][1:], torch.zeros(3, DIM))
    with pytest.raises(ValueError, match="data.text_features: the captions have 3 numbers each, the model reads 4"):
        collate(make_rows(number(2)), dim=4)
    with pytest.raises(ValueError, match="the rows have no text_features; name a .npz file with data.text_features"):
        collate([{"image": np.ones(2), "caption": "a", "sample_id": 0}])
