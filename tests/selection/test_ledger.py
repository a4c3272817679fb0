import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_dissect.selection import SampleLedger

HUGE_IDS = torch.tensor([2**62, 0, 17, 2**62 - 1, 12345678901234])


@pytest.fixture(params=["row numbers", "arbitrary ids"])
def ledger(request) -> SampleLedger:
    return SampleLedger(100 if request.param == "row numbers" else None, columns=("correlation", "history"))


def test_unseen_is_nan_and_written_is_read_back(ledger):
    ids = torch.tensor([7, 3, 99])
    assert ledger.read("correlation", ids).isnan().all()
    ledger.write("correlation", ids, torch.tensor([1.0, 2.0, 3.0]))
    assert ledger.read("correlation", torch.tensor([3, 4, 99, 7])).nan_to_num(-1).tolist() == [2.0, -1.0, 3.0, 1.0]
    assert ledger.read("history", ids).isnan().all()


def test_of_a_repeated_id_the_last_value_stays(ledger):
    ledger.write("history", torch.tensor([5, 5, 6, 5]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert ledger.read("history", torch.tensor([5, 6])).tolist() == [4.0, 3.0]


def test_arbitrary_ids_agree_with_a_dictionary():
    ledger, expected = SampleLedger(), {}
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = np.concatenate([generator.integers(0, 2**63 - 1, 200), generator.integers(0, 1000, 200)])
        values = generator.random(400, dtype=np.float32)
        ledger.write("correlation", torch.from_numpy(ids), torch.from_numpy(values))
        expected.update(zip(ids.tolist(), values.tolist(), strict=True))
    assert len(ledger) == len(expected)
    read = ledger.read("correlation", torch.tensor(list(expected)))
    assert read.tolist() == list(expected.values())
    assert dict(zip(ledger.ids.tolist(), ledger.column("correlation").tolist(), strict=True)) == expected


def test_huge_ids_are_kept_apart():
    ledger = SampleLedger()
    ledger.write("correlation", HUGE_IDS, torch.arange(5.0))
    assert ledger.read("correlation", HUGE_IDS).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ledger.read("correlation", HUGE_IDS + 1)[[0, 2, 4]].isnan().all()


def test_save_and_load_restore_values_and_metadata(ledger, tmp_path):
    ids = torch.tensor([1, 50, 12])
    ledger.write("history", ids, torch.tensor([0.5, 1.5, 2.5]))
    ledger.save(tmp_path / "ledger.safetensors", {"epoch": 3})
    other = SampleLedger(ledger.num_samples, columns=("correlation", "history", "of_another_strategy"))
    assert other.load(tmp_path / "ledger.safetensors") == {"epoch": 3}
    assert other.read("history", ids).tolist() == [0.5, 1.5, 2.5]
    assert other.read("of_another_strategy", ids).isnan().all()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.safetensors"]


def test_arbitrary_ids_keep_their_values_when_loaded_whatever_order_they_came_in(tmp_path):
    ledger = SampleLedger()
    for first in (900, 50, 4):
        ids = torch.arange(first, first + 3)
        ledger.write("correlation", ids, ids.float())
    ledger.save(tmp_path / "ledger.safetensors")
    loaded = SampleLedger()
    loaded.load(tmp_path / "ledger.safetensors")
    ids = torch.tensor([4, 5, 6, 50, 51, 52, 900, 901, 902])
    assert loaded.read("correlation", ids).tolist() == ids.tolist()
    loaded.write("correlation", torch.tensor([51, 7]), torch.tensor([-1.0, -2.0]))
    assert loaded.read("correlation", torch.tensor([50, 51, 7, 8])).nan_to_num(0).tolist() == [50, -1, -2, 0]
    assert len(loaded) == 10


def test_a_pair_costs_four_bytes_a_column(tmp_path):
    ledger = SampleLedger(250_000, columns=("a", "b", "c"))
    ledger.save(tmp_path / "ledger.safetensors")
    assert sum(ledger.column(name).nbytes for name in "abc") == 250_000 * 4 * 3
    assert (tmp_path / "ledger.safetensors").stat().st_size < 250_000 * 4 * 3 + 1000
    assert all(ledger.column(name).is_shared() for name in "abc")


def test_ids_outside_of_the_data_are_refused():
    ledger = SampleLedger(10)
    with pytest.raises(ValueError, match="sample_id 10 is outside 0 .. 9"):
        ledger.write("correlation", torch.tensor([3, 10]), torch.zeros(2))
    with pytest.raises(ValueError, match="sample_id -1 is outside"):
        ledger.read("correlation", torch.tensor([-1]))
    with pytest.raises(ValueError, match="sample_id -5 is negative"):
        SampleLedger().write("correlation", torch.tensor([-5]), torch.zeros(1))


def test_impossible_arguments_are_refused(ledger):
    with pytest.raises(ValueError, match="num_samples=0"):
        SampleLedger(0)
    with pytest.raises(ValueError, match="each once"):
        SampleLedger(5, columns=("a", "a"))
    with pytest.raises(KeyError, match="no column 'loss'"):
        ledger.read("loss", torch.tensor([1]))
    with pytest.raises(ValueError, match="1 values for 2 sample ids"):
        ledger.write("history", torch.tensor([1, 2]), torch.zeros(1))


def test_a_wrong_file_is_refused(tmp_path):
    path = tmp_path / "ledger.safetensors"
    with pytest.raises(FileNotFoundError):
        SampleLedger(10).load(path)
    path.write_bytes(b"not a ledger")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SampleLedger(10).load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a sample ledger"):
        SampleLedger(10).load(path)
    SampleLedger(11).save(path)
    with pytest.raises(ValueError, match="holds 11 pairs, this run has 10 pairs"):
        SampleLedger(10).load(path)
