import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_dissect.selection import recorder as recorder_module
from hf_dissect.selection.recorder import SelectionRecorder


def record(recorder: SelectionRecorder, steps: range, micro_steps: int = 1, size: int = 3) -> list[dict]:
    """Records steps and returns the rows that are then expected."""
    expected = []
    for step in steps:
        for micro_step in range(micro_steps):
            ids = [1000 * step + 10 * micro_step + place for place in range(size)]
            columns = {
                "epoch": [step // 4] * size,
                "step": [step] * size,
                "sample_id": ids,
                "correlation": [float(key % 97) for key in ids],
                "kept": [key % 2 == 0 for key in ids],
            }
            recorder.add(
                step // 4,
                step,
                torch.tensor(ids),
                torch.tensor(columns["correlation"]),
                torch.tensor(columns["kept"]),
            )
            expected += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return expected


def rows_of(folder) -> list[dict]:
    return pq.read_table(folder / "selection.parquet").to_pylist()


def test_one_row_a_candidate_and_step(tmp_path):
    recorder = SelectionRecorder(tmp_path / "run")
    expected = record(recorder, range(6))
    assert recorder.close() == tmp_path / "run" / "selection.parquet"
    assert rows_of(tmp_path / "run") == expected
    schema = pq.read_schema(tmp_path / "run" / "selection.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "epoch": pa.int32(),
        "step": pa.int64(),
        "sample_id": pa.int64(),
        "correlation": pa.float32(),
        "kept": pa.bool_(),
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["selection.parquet"]


def test_parts_are_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "ROWS_PER_PART", 7)
    recorder = SelectionRecorder(tmp_path)
    expected = record(recorder, range(120), micro_steps=4)
    assert len(list((tmp_path / "selection_parts").iterdir())) > 100
    recorder.close()
    assert rows_of(tmp_path) == expected


def test_what_is_recorded_no_longer_depends_on_the_batch(tmp_path):
    recorder = SelectionRecorder(tmp_path)
    ids, correlation, kept = torch.tensor([1, 2]), torch.tensor([0.5, 1.5]), torch.tensor([True, False])
    recorder.add(0, 0, ids, correlation, kept)
    for tensor in (ids, correlation, kept):
        tensor.zero_()
    recorder.close()
    assert [(row["sample_id"], row["correlation"], row["kept"]) for row in rows_of(tmp_path)] == [
        (1, 0.5, True),
        (2, 1.5, False),
    ]


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path, micro_steps):
    first = SelectionRecorder(tmp_path)
    first.restart(0)
    before = record(first, range(5), micro_steps)
    first.flush()  # checkpoint-5
    record(first, range(5, 8), micro_steps)
    first.flush()  # checkpoint-8
    record(first, range(8, 10), micro_steps)  # lost with the process

    resumed = SelectionRecorder(tmp_path)
    resumed.restart(5)
    after = record(resumed, range(5, 12), micro_steps)
    resumed.close()
    assert rows_of(tmp_path) == before + after


def test_a_finished_run_goes_on_with_its_record(tmp_path):
    first = SelectionRecorder(tmp_path)
    first.restart(0)
    before = record(first, range(10))
    first.close()
    resumed = SelectionRecorder(tmp_path)
    resumed.restart(6)
    after = record(resumed, range(6, 14))
    resumed.close()
    assert rows_of(tmp_path) == [row for row in before if row["step"] < 6] + after


def test_a_new_run_begins_anew_and_leaves_the_old_record_until_its_end(tmp_path):
    first = SelectionRecorder(tmp_path)
    old = record(first, range(3))
    first.close()
    second = SelectionRecorder(tmp_path)
    record(second, range(3))
    second.flush()  # then broken off
    third = SelectionRecorder(tmp_path)
    third.restart(0)
    new = record(third, range(2))
    third.flush()
    assert rows_of(tmp_path) == old
    # Resumed now, it goes on with its own parts, not with the record of the run before.
    fourth = SelectionRecorder(tmp_path)
    fourth.restart(2)
    new += record(fourth, range(2, 3))
    fourth.close()
    assert rows_of(tmp_path) == new


def test_a_part_broken_off_in_writing_does_not_stop_the_end(tmp_path):
    recorder = SelectionRecorder(tmp_path)
    expected = record(recorder, range(2))
    recorder.flush()
    (tmp_path / "selection_parts" / "000000000002-000001.parquet.tmp").write_bytes(b"half a part")
    recorder.close()
    assert rows_of(tmp_path) == expected and not (tmp_path / "selection_parts").exists()


def test_a_run_without_a_step_leaves_an_empty_record(tmp_path):
    SelectionRecorder(tmp_path / "run").close()
    assert rows_of(tmp_path / "run") == []


def test_a_run_killed_while_the_parts_are_removed_keeps_its_record(tmp_path, monkeypatch):
    recorder = SelectionRecorder(tmp_path)
    expected = record(recorder, range(3))
    recorder.flush()
    expected += record(recorder, range(3, 6))

    def killed(folder, **keywords):
        parts = sorted(folder.glob("*.parquet")) if folder.exists() else []
        if parts:
            parts[0].unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recorder_module.shutil, "rmtree", killed)
        recorder.close()
    resumed = SelectionRecorder(tmp_path)
    resumed.restart(5)
    resumed.close()
    assert rows_of(tmp_path) == [row for row in expected if row["step"] < 5]
    assert [path.name for path in tmp_path.iterdir()] == ["selection.parquet"]


def test_a_run_killed_while_the_record_is_made_parts_again_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "ROWS_PER_PART", 3)
    recorder = SelectionRecorder(tmp_path)
    expected = record(recorder, range(6))
    recorder.close()
    written, write_table = [], pq.write_table

    def killed(rows, path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_table(rows, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recorder_module.pq, "write_table", killed)
        SelectionRecorder(tmp_path).restart(4)
    resumed = SelectionRecorder(tmp_path)
    resumed.restart(4)
    resumed.close()
    assert rows_of(tmp_path) == [row for row in expected if row["step"] < 4]
