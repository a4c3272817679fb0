import pickle

import datasets
import numpy as np
import pytest
import torch
import xxhash
from datasets import Dataset, Features, Image, List, Value
from testing import tiny_models

from hf_dissect.data import shuffle_captions
from hf_dissect.data.pairs import PairColumns, PairDataset, PairStream, as_pairs, key_hash


def table(**columns) -> Dataset:
    rows = len(next(iter(columns.values())))
    columns = {"image": [{"bytes": bytes([row]), "path": None} for row in range(rows)], **columns}
    data = Dataset.from_dict(columns)
    return data.cast_column("image", Image(decode=False)) if isinstance(columns["image"][0], dict) else data


def three_rows(**columns) -> Dataset:
    return table(captions=[["a", "b"], [], ["c", None, "e"]], **columns)


def hashed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


# ---- columns ----


def test_usual_names_are_recognised_and_given_ones_preferred():
    assert PairColumns.recognise(["jpg", "text", "clean"]) == PairColumns("jpg", "text", clean="clean")
    assert PairColumns.recognise(["image", "img", "captions", "caption"]) == PairColumns("image", "caption")
    chosen = PairColumns.recognise(["a", "b", "key", "kind"], image="b", caption="a", sample_id="key", task="kind")
    assert chosen == PairColumns("b", "a", "key", "kind") and chosen.names == ["b", "a", "key", "kind"]


@pytest.mark.parametrize("argument", ["image", "caption", "sample_id", "task", "clean"])
def test_a_named_column_must_be_there(argument):
    column = {"sample_id": "id_column"}.get(argument, f"{argument}_column")
    with pytest.raises(ValueError, match=f"{column}='x': no such column; the data has image, caption"):
        PairColumns.recognise(["image", "caption"], **{argument: "x"})


def test_columns_that_cannot_be_guessed_must_be_named():
    with pytest.raises(ValueError, match="No column named caption or text or captions; the data has image, title"):
        PairColumns.recognise(["image", "title"])


# ---- pairs and their numbers ----


def test_one_caption_a_row_makes_numbered_pairs():
    pairs = as_pairs(table(caption=["a", "b", "c"]))
    assert len(pairs) == pairs.num_samples == 3 and not pairs.knows_truth
    assert pairs[1] == {"image": {"bytes": b"\x01", "path": None}, "caption": "b", "sample_id": 1}
    assert [pair["sample_id"] for pair in pairs.__getitems__([2, 0])] == [2, 0]
    assert pairs[-1] == pairs[2]
    assert as_pairs(pairs) is pairs


def test_several_captions_are_numbered_row_by_row_and_a_row_without_one_stays():
    pairs = as_pairs(three_rows(clean=[[True, False], [], [False, False, True]]))
    assert len(pairs) == 6 and pairs.knows_truth
    found = [(pair["image"]["bytes"][0], pair["caption"], pair["is_clean"]) for pair in pairs]
    assert found == [
        (0, "a", True),
        (0, "b", False),
        (1, None, False),
        (2, "c", False),
        (2, None, False),
        (2, "e", True),
    ]
    assert [pair["sample_id"] for pair in pairs] == list(range(6))
    assert list(pairs.captions()) == ["a", "b", "c", "e"]


def test_lists_of_captions_of_one_length_are_several_captions():
    data = table(captions=[["a", "b"], ["c", "d"]])
    data = data.cast_column("captions", List(Value("string"), length=2))
    assert [pair["caption"] for pair in as_pairs(data)] == ["a", "b", "c", "d"]


def test_a_truth_of_the_row_holds_for_all_its_captions():
    pairs = as_pairs(three_rows(clean=[1, 0, 0]))
    assert [pair["is_clean"] for pair in pairs] == [True, True, False, False, False, False]


def test_a_filtered_and_shuffled_table_is_read_in_its_own_order():
    data = table(caption=list("abcdef")).select([5, 3, 1])
    pairs = as_pairs(data)
    assert [(pair["image"]["bytes"][0], pair["caption"]) for pair in pairs] == [(5, "f"), (3, "d"), (1, "b")]
    assert list(pairs.captions()) == ["f", "d", "b"]


def test_the_format_of_the_table_does_not_matter():
    data = three_rows(key=[4, 5, 6]).with_format("torch")
    plain, formatted = (as_pairs(rows, sample_id="key") for rows in (data.with_format(None), data))
    assert list(plain) == list(formatted)


def test_pairs_go_to_workers():
    pairs = as_pairs(three_rows(key=["x", "y", "z"]), sample_id="key")
    assert list(pickle.loads(pickle.dumps(pairs))) == list(pairs)


# ---- ids ----


def test_integer_ids_are_taken_as_they_are():
    pairs = as_pairs(table(caption=["a", "b", "c"], key=[10**15, 0, 7]), sample_id="key")
    assert [pair["sample_id"] for pair in pairs] == [10**15, 0, 7] and pairs.num_samples is None
    assert [pairs.find(key) for key in (7, 10**15, 0)] == [2, 0, 1]
    with pytest.raises(KeyError, match="sample_id 8: no pair"):
        pairs.find(8)


def test_integer_ids_of_several_captions_leave_room_for_each():
    pairs = as_pairs(three_rows(key=[10, 2, 5]), sample_id="key")
    assert [pair["sample_id"] for pair in pairs] == [30, 31, 6, 15, 16, 17]
    assert [pairs.find(pair["sample_id"]) for pair in pairs] == list(range(6))


def test_string_ids_are_hashed():
    assert key_hash("x.jpg") == hashed("x.jpg") < 2**63
    pairs = as_pairs(table(caption=["a", "b"], key=["x.jpg", "y.jpg"]), sample_id="key")
    assert pairs.sample_ids.tolist() == [hashed("x.jpg"), hashed("y.jpg")]
    pairs = as_pairs(three_rows(key=["x", "y", "z"]), sample_id="key")
    assert pairs.sample_ids.tolist() == [hashed(key) for key in ("x#0", "x#1", "y#0", "z#0", "z#1", "z#2")]
    assert pairs.find(hashed("z#1")) == 4


def test_row_numbers_are_found_and_others_not():
    pairs = as_pairs(table(caption=["a", "b"]))
    assert pairs.find(1) == 1
    for unknown in (2, -1):
        with pytest.raises(KeyError, match=f"sample_id {unknown}"):
            pairs.find(unknown)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ([1, 2, 1], "id_column='key': 1 ids are not unique, first 1; give each row an id of its own"),
        (["x", "y", "y"], "1 ids are not unique, first 'y'"),
        ([1, -4, 2], "id -4 is negative; ids are integers from 0 upwards"),
        ([1, None, 2], "id_column='key': 1 rows have no id"),
        ([1.5, 2.5, 3.5], "holds double; ids are integers or strings"),
        ([True, False, True], "holds bool; ids are integers or strings"),
        (np.array([1, 2, 2**63], dtype=np.uint64), "id 9223372036854775808 is too large"),
    ],
)
def test_unusable_ids_are_told_before_training(key, message):
    with pytest.raises(ValueError, match=message):
        as_pairs(table(caption=["a", "b", "c"], key=key), sample_id="key")


def test_ids_that_would_overflow_with_several_captions_are_told():
    with pytest.raises(ValueError, match="with 3 captions a row, ids go up to 3074457345618258601"):
        as_pairs(three_rows(key=[1, 2, 2**62]), sample_id="key")
    largest = 2**63 // 3 - 1
    assert as_pairs(three_rows(key=[1, 2, largest]), sample_id="key").sample_ids.max() == 3 * largest + 2


# ---- tasks and truth ----


def test_tasks_are_integers_or_ranked_names():
    pairs = as_pairs(table(caption=["a", "b", "c"], task=[4, 0, 4]), task="task")
    assert [pair["task_id"] for pair in pairs] == [4, 0, 4]
    pairs = as_pairs(three_rows(task=["photo", "art", "web"]), task="task")
    assert [pair["task_id"] for pair in pairs] == [1, 1, 0, 2, 2, 2]
    with pytest.raises(ValueError, match="task_column='task': 1 rows have no task"):
        as_pairs(table(caption=["a", "b"], task=["x", None]), task="task")
    with pytest.raises(ValueError, match="holds double; tasks are integers or names"):
        as_pairs(table(caption=["a", "b"], task=[0.5, 1.5]), task="task")


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (["yes", "no", "no"], "clean_column='clean' holds string, not true or false"),
        ([True, None, False], "the truth of 1 pairs is missing"),
        ([[True, True], [], [True]], "row 2 has 1 values for 3 captions"),
        ([[True, True], [], [True, None, True]], "the truth of 1 pairs is missing"),
    ],
)
def test_an_unusable_truth_is_told_before_training(clean, message):
    with pytest.raises(ValueError, match=message):
        as_pairs(three_rows(clean=clean), clean="clean")


@pytest.mark.parametrize("values", [["a", "b", "c"], [0.5, 1.0, 0.0], [0, 1, 2], [["x"], [], ["y"]], [-1, 0, 1]])
def test_a_column_of_a_usual_name_that_holds_no_truth_means_something_else(values):
    for data in (three_rows(clean=values), three_rows(clean=values).to_iterable_dataset()):
        if isinstance(values[0], int) and isinstance(data, datasets.IterableDataset):
            continue  # a stream does not know the values of a column beforehand
        pairs = as_pairs(data)
        assert not pairs.knows_truth and "is_clean" not in next(iter(pairs))


def test_the_next_usual_name_is_looked_at():
    pairs = as_pairs(table(caption=["a", "b"], clean=["x", "y"], is_clean=[True, False]))
    assert pairs.columns.clean == "is_clean" and [pair["is_clean"] for pair in pairs] == [True, False]


@pytest.mark.parametrize("values", [[True, False, True], [0, 1, 1]])
def test_true_and_false_or_0_and_1_are_the_truth(values):
    assert [pair["is_clean"] for pair in as_pairs(table(caption=["a", "b", "c"], clean=values))] == list(
        map(bool, values)
    )


@pytest.mark.parametrize(("values", "column"), [(["x", "y"], "is_clean"), ([True, True], "clean")])
def test_noise_leaves_a_column_of_another_kind_alone(values, column):
    noisy = shuffle_captions(table(caption=["a", "b"], clean=values), rate=1.0)
    assert noisy[column] == [False, False] and (column == "clean" or noisy["clean"] == values)


def test_lists_of_truth_need_lists_of_captions():
    with pytest.raises(ValueError, match="holds lists, but a row has one caption"):
        as_pairs(table(caption=["a", "b"], clean=[[True], [False]]))


# ---- pictures and feature vectors ----


def test_feature_vectors_are_arrays_and_the_picture_is_still_found():
    data = tiny_models.tiny_pairs(4)
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    data = data.add_column("image_features", features.tolist(), feature=List(Value("float32"), length=3))
    pairs = as_pairs(data, image="image_features")
    found = [pair["image"] for pair in pairs.__getitems__([3, 1])]
    assert all(isinstance(vector, np.ndarray) and vector.dtype == np.float32 for vector in found)
    assert np.array_equal(found, features[[3, 1]])
    assert np.array_equal(np.asarray(pairs.picture(2)), np.asarray(tiny_models.tiny_picture(2)[0]))


def test_pictures_are_undecoded_in_pairs_and_decoded_for_people(tmp_path):
    decoding = tiny_models.tiny_pairs(2, captions_per_image=3).cast_column("image", Image())
    pairs = as_pairs(decoding)
    assert pairs[4]["image"]["bytes"].startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(pairs.picture(4)), np.asarray(tiny_models.tiny_picture(1)[0]))
    tiny_models.tiny_picture(5)[0].save(tmp_path / "5.png")
    paths = as_pairs(Dataset.from_dict({"image_path": [str(tmp_path / "5.png"), "nowhere.png"], "text": ["a", "b"]}))
    assert paths[0]["image"] == str(tmp_path / "5.png")
    assert np.array_equal(np.asarray(paths.picture(0)), np.asarray(tiny_models.tiny_picture(5)[0]))
    assert paths.picture(1) is None
    assert as_pairs(Dataset.from_dict({"image": [[0.5, 1.0]], "caption": ["a"]})).picture(0) is None


def test_nothing_is_decoded_until_it_is_asked_for():
    rows = table(caption=["a", "b"])  # the bytes are no images
    assert as_pairs(rows)[0]["image"]["bytes"] == b"\x00" and as_pairs(rows).picture(0) is None


# ---- what can be wrapped ----


def test_a_list_of_dicts_is_a_table():
    rows = [{"image": tiny_models.tiny_picture(0)[0], "text": "a", "clean": True}, {"text": None, "clean": False}]
    pairs = as_pairs(rows)
    assert isinstance(pairs, PairDataset) and pairs[0]["image"]["bytes"] and pairs[1]["image"] is None
    assert pairs[1]["caption"] is None and [pair["is_clean"] for pair in pairs] == [True, False]


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_a_torch_data_set_of_pairs_stays():
    rows = Rows([{"image": b"", "caption": "a", "sample_id": 5}])
    assert as_pairs(rows) is rows


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "no rows"),
        ([1, 2], "Row 0 is int; pass a list of dicts"),
        ([{"image": "a", "caption": "b"}, {"image": "c", "caption": 5}], "does not make a table"),
        (Dataset.from_dict({}), "no rows; check the path, the split and any filter"),
        (Rows([]), "no rows"),
        (Rows([{"image": 1, "caption": "a"}]), "Rows yields without sample_id; a torch data set yields"),
        (Rows([(1, 2)]), "Rows yields tuple"),
        ("train", "str yields str"),
        (5, "int is not a data set"),
    ],
)
def test_what_is_no_data_set_is_told(dataset, message):
    with pytest.raises(ValueError, match=message):
        as_pairs(dataset)


def test_a_choice_of_split_is_asked_for():
    splits = datasets.DatasetDict(train=table(caption=["a"]), test=table(caption=["b"]))
    with pytest.raises(ValueError, match="DatasetDict holds several splits; pass one of them: 'train', 'test'"):
        as_pairs(splits)


# ---- streams ----


def test_a_stream_gives_the_pairs_of_the_table():
    data = three_rows(clean=[[True, False], [], [False, False, True]], task=[3, 4, 5])
    names = {"task": "task"}
    from_table, from_stream = list(as_pairs(data, **names)), list(as_pairs(data.to_iterable_dataset(), **names))
    assert [{**pair, "sample_id": 0} for pair in from_table] == [{**pair, "sample_id": 0} for pair in from_stream]


def test_ids_of_a_stream_do_not_depend_on_the_order():
    data = tiny_models.tiny_pairs(12, captions_per_image=2)
    stream = as_pairs(data.to_iterable_dataset(num_shards=4))
    assert isinstance(stream, PairStream) and stream.num_samples is None
    forward = {(pair["image"]["bytes"], pair["caption"]): pair["sample_id"] for pair in stream}
    shuffled = as_pairs(data.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=5))
    pairs = list(shuffled)
    assert [pair["caption"] for pair in pairs] != [pair["caption"] for pair in stream]
    assert {(pair["image"]["bytes"], pair["caption"]): pair["sample_id"] for pair in pairs} == forward
    assert len(set(forward.values())) == 24 and min(forward.values()) >= 0


def test_a_stream_read_by_two_workers_gives_each_pair_once():
    data = tiny_models.tiny_pairs(12, captions_per_image=2)
    stream = as_pairs(data.to_iterable_dataset(num_shards=4))
    loader = torch.utils.data.DataLoader(stream, batch_size=4, num_workers=2, collate_fn=list)
    assert sorted(pair["sample_id"] for batch in loader for pair in batch) == sorted(p["sample_id"] for p in stream)


def test_ids_of_a_stream_come_from_the_id_column():
    stream = table(caption=["a", "b"], key=[8, 2]).to_iterable_dataset()
    assert [pair["sample_id"] for pair in as_pairs(stream, sample_id="key")] == [8, 2]
    stream = three_rows(key=["x", "y", "z"]).to_iterable_dataset()
    expected = [hashed(key) for key in ("x#0", "x#1", "y#0", "z#0", "z#1", "z#2")]
    assert [pair["sample_id"] for pair in as_pairs(stream, sample_id="key")] == expected


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("sample_id", [1, -2], "id -2 is negative"),
        ("sample_id", ["x", None], "id_column='extra' holds None; ids are integers or strings"),
        ("task", ["photo", "art"], "in a stream tasks must be integers"),
        ("clean", [True, None], "clean_column='extra' holds None for 'b'"),
        ("clean", ["yes", "no"], "clean_column='extra' holds 'yes' for 'a'"),
    ],
)
def test_unusable_columns_of_a_stream_are_told_where_they_are_met(column, values, message):
    stream = table(caption=["a", "b"], extra=values).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        list(as_pairs(stream, **{column: "extra"}))


def test_a_stream_of_unknown_columns_is_asked_for_its_first_row():
    def rows():
        yield {"img": {"bytes": b"x", "path": None}, "text": "a"}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.column_names is None
    assert [pair["caption"] for pair in as_pairs(stream)] == ["a"]
    with pytest.raises(ValueError, match="The data set has no rows"):
        as_pairs(datasets.IterableDataset.from_generator(lambda: iter(())))


def test_a_stream_without_rows_is_told_when_it_is_read():
    stream = as_pairs(table(caption=["a", "b"]).to_iterable_dataset().filter(lambda row: False))
    with pytest.raises(ValueError, match="The data set has no rows; check the path, the split and any filter"):
        next(iter(stream))


def test_a_stream_of_feature_vectors_gives_arrays():
    features = Features({"image": List(Value("float32"), length=2), "captions": List(Value("string"))})
    data = Dataset.from_dict({"image": [[1.0, 2.0]], "captions": [["a", "b"]]}, features=features)
    pairs = list(as_pairs(data.to_iterable_dataset()))
    assert [pair["caption"] for pair in pairs] == ["a", "b"]
    assert pairs[0]["image"].dtype == np.float32 and pairs[0]["image"].tolist() == [1.0, 2.0]
