import pytest
import torch

from hf_dissect.data.bad_rows import BadReason, BadRows, TooManyBadRows


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
    add(rows, list(range(64)), [1] * 64)
    with pytest.raises(TooManyBadRows, match="128 of 128 pairs"):
        add(rows, list(range(64, 128)), [1] * 64)


def test_the_first_bad_row_is_warned_of(caplog):
    rows = BadRows(max_fraction=1.0, num_pairs=10)
    add(rows, [4, 6], [0, 1])
    add(rows, [8], [1])
    assert [record.message for record in caplog.records] == [
        "Skipping a pair that cannot be read (id 6); all are counted."
    ]
