import json

import pytest
import torch

from hf_dissect.data.bad_rows import BadReason, BadRows, TooManyBadRows
from hf_dissect.data.problems import PROBLEM_KEY, join_problem, pack_problems, read_problems, split_problem


def add(rows: BadRows, ids: list[int], reasons: list[int]) -> list[int]:
    return rows.add(torch.tensor(ids), torch.tensor(reasons, dtype=torch.int8)).tolist()


def test_good_positions_are_returned_and_bad_rows_counted_once():
    rows = BadRows(max_fraction=1.0, num_pairs=100)
    for _ in range(3):
        assert add(rows, [7, 5, 9, 3], [0, BadReason.IMAGE, 0, BadReason.CAPTION_MISSING]) == [0, 2]
    assert add(rows, [8], [BadReason.IMAGE]) == []
    assert len(rows) == 3
    assert rows.summary() == {
        "count": 3,
        "reasons": {"image missing or undecodable": 2, "caption missing or empty": 1},
        "ids": [3, 5, 8],
    }
    assert rows.summary(max_ids=1)["ids"] == [3]


def test_the_limit_is_a_share_of_the_data_set():
    rows = BadRows(max_fraction=0.02, num_pairs=100)
    assert add(rows, [1, 2], [1, 1]) == []
    with pytest.raises(TooManyBadRows) as caught:
        add(rows, [30], [BadReason.CAPTION_NOT_TEXT])
    message = str(caught.value)
    assert "3 of 100 pairs" in message and "max_bad_fraction=0.02" in message and "1, 2, 30" in message
    assert "2 x image missing or undecodable" in message and "1 x caption not a string" in message


def test_nothing_may_be_bad_with_a_limit_of_zero():
    rows = BadRows(max_fraction=0.0, num_pairs=1000)
    assert add(rows, [1], [0]) == [0]
    with pytest.raises(TooManyBadRows):
        add(rows, [2], [1])


def test_a_stream_is_judged_by_what_it_has_shown():
    rows = BadRows(max_fraction=0.01)
    for start in range(0, 900, 100):
        add(rows, list(range(start, start + 100)), [1, 1] + [0] * 98)  # 2 %, but fewer than 1,000 rows
    with pytest.raises(TooManyBadRows, match="20 of 1000 pairs"):
        add(rows, list(range(900, 1000)), [1, 1] + [0] * 98)


def test_rows_of_a_stream_seen_again_count_on_both_sides():
    rows = BadRows(max_fraction=0.015)
    for _ in range(3):
        add(rows, list(range(500)), [1] * 7 + [0] * 493)  # 1.4 %
    assert len(rows) == 7
    with pytest.raises(TooManyBadRows, match="41 of 2000 pairs"):
        add(rows, list(range(500)), [1] * 20 + [0] * 480)


def test_a_stream_that_is_mostly_bad_is_not_read_to_a_thousand():
    rows = BadRows(max_fraction=0.01)
    add(rows, list(range(64)), [2] * 64)
    with pytest.raises(TooManyBadRows, match="128 of 128 pairs"):
        add(rows, list(range(64, 128)), [2] * 64)


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_a_stream_whose_first_pictures_all_fail_stops_at_its_first_batch_of_eight(batch):
    rows = BadRows(max_fraction=1.0)
    problems = {0: join_problem("no such file", "/data/7.jpg")}
    with pytest.raises(TooManyBadRows, match=r"None of the first \d+ pictures .*no such file: /data/7.jpg \(id 0\)"):
        for start in range(0, 200, batch):
            rows.add(torch.arange(start, start + batch), torch.ones(batch, dtype=torch.int8), problems)
    assert len(rows) == max(batch, -(-8 // batch) * batch)


def test_one_good_picture_is_enough_for_a_stream_to_be_judged_later():
    rows = BadRows(max_fraction=1.0)
    add(rows, [0], [0])
    add(rows, list(range(1, 60)), [1] * 59)
    assert len(rows) == 59


# ---- why ----


def test_the_first_problems_are_in_warning_message_and_figures(caplog):
    rows = BadRows(max_fraction=0.2, num_pairs=10)
    problems = {0: join_problem("no such file", "/data/é 7.jpg"), 2: join_problem("int 5")}
    rows.add(torch.tensor([4, 5, 6]), torch.tensor([1, 0, BadReason.CAPTION_NOT_TEXT], dtype=torch.int8), problems)
    assert [record.message for record in caplog.records] == [
        "Skipping a pair that cannot be read (id 4: image missing or undecodable: no such file: /data/é 7.jpg); "
        "all are counted.",
        "Skipping a pair that cannot be read (id 6: caption not a string: int 5); all are counted.",
    ]
    assert rows.summary()["problems"] == [
        {"id": 4, "problem": "no such file", "path": "/data/é 7.jpg"},
        {"id": 6, "problem": "int 5", "path": None},
    ]
    again = BadRows(max_fraction=0.2, num_pairs=10)
    again.load_state_dict(json.loads(json.dumps(BadRows.join_states([rows.state_dict()]))))
    assert again.summary() == rows.summary()
    with pytest.raises(TooManyBadRows, match=r"First problems: no such file: /data/é 7.jpg \(id 4\); int 5 \(id 6\)"):
        add(again, [9], [2])


def test_a_state_of_an_earlier_version_has_no_problems():
    rows = BadRows(max_fraction=1.0)
    rows.load_state_dict({"reasons": {"3": 1}, "rows_seen": 9, "bad_seen": 1})
    assert rows.summary() == {"count": 1, "reasons": {"image missing or undecodable": 1}, "ids": [3]}


def test_problems_are_few_however_many_rows_are_bad():
    rows = BadRows(max_fraction=1.0, num_pairs=100_000)
    for start in range(0, 5000, 50):
        rows.add(torch.arange(start, start + 50), torch.ones(50, dtype=torch.int8), dict.fromkeys(range(50), "x"))
    assert len(rows) == 5000 and len(rows.state_dict()["problems"]) == 100 and len(rows.summary()["problems"]) == 20


@pytest.mark.parametrize(
    ("problem", "path"),
    [
        ("no such file", "/data/7.jpg"),
        ("no such file", "/data/" + "long/" * 200 + "7.jpg"),
        ("ValueError: " + "x" * 1000, "/data/7.jpg"),
        ("é" * 500, "ü" * 500),
        ("two\nlines", None),
        ("'\ud800'", "/data/\ud800.jpg"),
        ("a\0b", "c\0d"),
    ],
)
def test_a_problem_travels_as_bytes_and_keeps_its_beginning_and_the_end_of_its_path(problem, path):
    joined = join_problem(problem, path)
    packed = pack_problems(["", joined, ""])
    assert packed.dtype == torch.uint8 and packed.shape == (3, 240) and not packed[[0, 2]].any()
    assert read_problems({PROBLEM_KEY: packed}) == {1: joined}
    found, place = split_problem(joined)
    assert found[:5] == problem.replace("\n", " ").replace("\0", "").encode("utf-8", "backslashreplace").decode()[:5]
    assert (place is None) == (path is None) and len(joined.encode()) <= 240
    if path:
        assert place[-5:] == path.replace("\0", "").encode("utf-8", "backslashreplace").decode()[-5:]


def test_the_first_bad_row_is_warned_of(caplog):
    rows = BadRows(max_fraction=1.0, num_pairs=10)
    add(rows, [4, 6], [0, 1])
    add(rows, [8], [1])
    assert [record.message for record in caplog.records] == [
        "Skipping a pair that cannot be read (id 6: image missing or undecodable); all are counted."
    ]
