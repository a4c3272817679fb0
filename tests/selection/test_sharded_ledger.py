"""A ledger that is split over the processes of a run is, value for value, the one that each would hold as a whole."""

from functools import partial

import pytest
import torch
from testing import ledger_ranks
from testing.launched import on_ranks

from hf_dissect import SampleLedger, SelectionStrategy
from hf_dissect.auditing.ledger_columns import open_ledger
from hf_dissect.selection.ledger_files import read_scores
from hf_dissect.selection.saved_ledger import LEDGER_FILE, has_ledger, read_ledger, write_ledger
from hf_dissect.selection.shard_group import Route, find_homes, plan_stages
from hf_dissect.selection.strategies import STRATEGIES
from hf_dissect.selection.strategy import records_each_pair_alone


def test_processes_hold_a_part_each_and_read_the_same(tmp_path):
    shares = on_ranks([2, 3, 6], tmp_path, partial(ledger_ranks.check_ledger, tmp_path))
    assert all(0.6 / size < share < 1.5 / size for size, share in shares.items()), shares


def test_runs_with_a_part_in_each_process_are_the_same(tmp_path):
    on_ranks([2], tmp_path, partial(ledger_ranks.check_runs, tmp_path, ["channel", "info-batch"]))


@pytest.mark.slow
def test_all_kinds_of_runs_are_the_same_and_resume(tmp_path):
    on_ranks([2, 3, 4], tmp_path, partial(ledger_ranks.check_all_runs, tmp_path))
    # One process continues what two have begun, from their shards.
    settings = {**ledger_ranks.RUNS["dissect"], "stream": True, "max_steps": 12}
    alone = ledger_ranks.make_trainer(tmp_path / "alone", **settings)
    checkpoint = tmp_path / "resumed" / "whole" / "checkpoint-5"
    saved = read_ledger(checkpoint)
    alone.ledger.load(checkpoint / LEDGER_FILE)
    assert torch.equal(alone.ledger.read("history", saved.ids), saved.columns["history"])
    alone.train(resume_from_checkpoint=str(checkpoint))
    assert alone.state.global_step == 12 and set(saved.ids.tolist()) <= set(alone.ledger.ids.tolist())
    # Whoever reads the scores of a run reads its shards.
    for scores in (read_scores(checkpoint), open_ledger(checkpoint).as_saved()):
        assert torch.equal(scores.columns["correlation"], saved.columns["correlation"])
    assert (saved.ids[1:] > saved.ids[:-1]).all() and saved.metadata["strategy"] == "dissect"


def test_homes_are_fixed_and_even():
    """A checkpoint of earlier days is found again, and consecutive, spaced and random ids spread over the ranks."""
    assert find_homes(torch.tensor([0, 1, 2, 12345, 2**31, 2**62, 2**63 - 1]), 1024).tolist() == PINNED
    generator = torch.Generator().manual_seed(0)
    for ids in (
        torch.arange(100_000),
        torch.arange(100_000) * 4096,
        torch.randint(2**63 - 1, (100_000,), generator=generator),
    ):
        for count in (2, 3, 8, 1024):
            numbers = torch.bincount(find_homes(ids, count), minlength=count).double()
            assert len(numbers) == count and ((numbers - 1e5 / count).abs() < 6 * (1e5 / count) ** 0.5 + 1).all()


PINNED = [0, 485, 138, 337, 159, 197, 701]


def test_packets_hold_each_pair_in_its_place():
    ids = torch.tensor([8, 3, 8, 2**40, 5])
    route = Route(ids, 3)
    split = route.fullest
    packets = route.pack(ids[:, None].view(torch.uint8), split, 3).view(torch.int64).view(3, split)
    for home in range(3):
        inside = [one for one in ids.tolist() if find_homes(torch.tensor([one]), 3).item() == home]
        assert packets[home].tolist() == inside + [-1] * (split - len(inside))
    assert route.unpack(packets[:, :, None], split).flatten().tolist() == ids.tolist()
    nobody = Route(torch.zeros(0, dtype=torch.int64), 3)
    assert nobody.fullest == 0 and nobody.unpack(torch.zeros(3, 2, 4), 2).shape == (0, 4)


def test_stages_have_few_processes_each():
    shapes = {count: plan_stages(count) for count in (2, 15, 16, 64, 96, 1000, 1024, 17)}
    assert shapes == {
        **{2: [2], 15: [15], 16: [4, 4], 64: [4, 4, 4], 96: [4, 4, 2, 3], 1000: [4, 2, 5, 5, 5]},
        **{1024: [4] * 5, 17: [17]},
    }
    assert plan_stages(4, 2) == [4] and plan_stages(6, 2) == [2, 3]


def test_only_rules_that_say_so_record_parts():
    class CountsAll(SelectionStrategy):
        name = "counts"

        def record(self, sample_id, correlation, ledger, measured=None):
            self.count = len(sample_id)

    class Inherits(STRATEGIES["dissect"]):
        def record(self, sample_id, correlation, ledger, measured=None):
            super().record(sample_id, correlation, ledger, measured)

    class SaysSo(CountsAll):
        records_pairs_alone = True

        def record(self, sample_id, correlation, ledger, measured=None):
            ledger.write("correlation", sample_id, correlation)

    assert not records_each_pair_alone(CountsAll()) and not records_each_pair_alone(Inherits())
    assert records_each_pair_alone(SaysSo())
    by_name = {name: records_each_pair_alone(kind()) for name, kind in STRATEGIES.items()}
    assert not by_name.pop("coreset") and all(by_name.values()), by_name


def save_shards(folder, count):
    ledger = SampleLedger(None, ("correlation",))
    ids = torch.arange(20) * 2**40
    ledger.write("correlation", ids, torch.arange(20.0))
    for number in range(count):
        part = ledger.as_saved({"epoch": 1}).subset(find_homes(ids, count) == number)
        write_ledger(folder / LEDGER_FILE, part, (number, count))
    return ids


def test_shards_are_one_ledger_or_refused(tmp_path):
    assert not has_ledger(tmp_path)
    ids = save_shards(tmp_path, 3)
    assert has_ledger(tmp_path)
    saved = read_ledger(tmp_path / LEDGER_FILE)
    assert torch.equal(saved.ids, ids) and saved.columns["correlation"].tolist() == list(range(20))
    SampleLedger(None, ("correlation",)).load(tmp_path / LEDGER_FILE)
    first, second, third = sorted(tmp_path.glob("ledger-*"))
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match="lacks ledger-00001-of-00003.safetensors"):
        read_ledger(tmp_path)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match="ledger-00001-of-00003.safetensors was written as shard 2 of 3"):
        read_ledger(tmp_path)
    second.write_bytes(kept)
    (tmp_path / "other").mkdir()
    save_shards(tmp_path / "other", 2)
    (tmp_path / "other" / "ledger-00001-of-00002.safetensors").rename(tmp_path / "ledger-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="of 2 and of 3 processes"):
        read_ledger(tmp_path)
    # What is written in the place of a ledger replaces its other forms.
    save_shards(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("ledger*")) == [
        f"ledger-{number:05d}-of-00002.safetensors" for number in range(2)
    ]
    SampleLedger(5).save(tmp_path / LEDGER_FILE)
    assert [path.name for path in tmp_path.glob("ledger*")] == [LEDGER_FILE]
    save_shards(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("ledger*")] == ["ledger-00000-of-00001.safetensors"]


def test_one_process_and_row_numbers_have_a_whole_ledger(tmp_path):
    trainer = ledger_ranks.make_trainer(tmp_path)
    assert type(trainer.ledger) is SampleLedger and trainer.ledger.num_samples is None
