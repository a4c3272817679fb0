"""The pairs of a block are chosen before loading: the best or in proportion, a share again, the unknown always."""

import math

import pytest
import torch

from hf_dissect.selection.block_choice import BlockRule, LoadedRows, count_selected
from hf_dissect.selection.planned_loading import BlockCollator


def rule_of(ratio=0.5, m=4, samples=False, scores=True, seed=0) -> BlockRule:
    return BlockRule(ratio, m, samples, scores, seed)


def ids_of(size, start=0):
    return torch.arange(start, start + size)


@pytest.mark.parametrize("size", [2, 3, 17, 64])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_the_largest_values_train_and_a_share_of_the_others_is_scored(size, ratio):
    generator = torch.Generator().manual_seed(size)
    planned = torch.randn(size, generator=generator)
    k, counts = min(size, max(2, round(ratio * size))), torch.zeros(size)
    for epoch in range(200):
        loaded = rule_of(ratio).choose(ids_of(size), planned, epoch)
        trained = loaded.rows[loaded.inclusion > 0]
        assert sorted(planned[trained].tolist(), reverse=True) == planned.sort(descending=True).values[:k].tolist()
        assert set(loaded.inclusion.tolist()) <= {0.0, 1.0} and torch.equal(loaded.planned, planned[loaded.rows])
        assert loaded.rows.tolist() == sorted(loaded.rows.tolist())
        left = loaded.unloaded["unloaded_id"]
        assert sorted([*loaded.rows.tolist(), *left.tolist()]) == list(range(size))
        assert torch.equal(loaded.unloaded["unloaded_planned"], planned[left])
        counts[loaded.rows[loaded.inclusion == 0]] += 1
    rest = planned.argsort(descending=True)[k:]
    share = counts[rest].sum() / (200 * max(1, len(rest)))
    assert len(rest) == 0 or abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (200 * len(rest)))


def test_unknown_pairs_are_always_loaded_and_rank_in_the_middle():
    planned = torch.tensor([5.0, 4.0, torch.nan, 1.0, 0.0, torch.nan, 3.0, 2.0])
    for epoch in range(20):
        loaded = rule_of(m=10**9).choose(ids_of(8), planned, epoch)
        trained = loaded.rows[loaded.inclusion > 0].tolist()
        assert {2, 5} <= set(loaded.rows.tolist()) and {0, 1, 6} <= set(trained) and len(trained) == 4
    everything = rule_of(m=10**9).choose(ids_of(8), torch.full((8,), torch.nan), 0)
    assert len(everything.rows) == 8 and int((everything.inclusion > 0).sum()) == 4


def test_pairs_are_drawn_in_proportion_to_their_weights():
    planned = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.8, 0.9, torch.nan, 1.0])
    known = planned[~planned.isnan()]
    weights = torch.where(planned.isnan(), known.mean(), planned).double()
    low, high = 0.0, 1e3
    for _ in range(200):  # the factor c of min(1, c w) that makes the sum 4
        c = (low + high) / 2
        low, high = (c, high) if (c * weights).clamp(max=1).sum() < 4 else (low, c)
    wanted, drawn = (c * weights).clamp(max=1), torch.zeros(8)
    for epoch in range(2000):
        loaded = rule_of(samples=True).choose(ids_of(8), planned, epoch)
        trained = loaded.inclusion > 0
        assert int(trained.sum()) == 4
        torch.testing.assert_close(loaded.inclusion[trained], wanted[loaded.rows[trained]].float())
        drawn[loaded.rows[trained]] += 1
    assert (drawn / 2000 - wanted).abs().max() < 0.05


def test_equal_values_are_chosen_at_random_and_nothing_is_scored_without_scores():
    rule, counts = rule_of(scores=False), torch.zeros(10)
    for epoch in range(400):
        loaded = rule.choose(ids_of(10), torch.zeros(10), epoch)
        assert len(loaded.rows) == 5 and (loaded.inclusion == 1).all()
        counts[loaded.rows] += 1
    assert (counts / 400 - 0.5).abs().max() < 0.1


def test_choices_follow_seed_epoch_and_ids_alone():
    planned = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def rows(seed=0, epoch=3, start=0):
        return rule_of(seed=seed, samples=False).choose(ids_of(64, start), planned, epoch).rows.tolist()

    state = torch.get_rng_state()
    assert rows() == rows() and torch.equal(torch.get_rng_state(), state)
    assert len({str(rows(*given)) for given in [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 7)]}) == 4


def test_a_collator_of_any_rows_tells_what_was_loaded():
    def collate(rows):
        return {"sample_id": torch.tensor(rows)}

    loaded = rule_of().choose(ids_of(8, 100), torch.arange(8.0), 0)
    batch = BlockCollator(collate)(LoadedRows([100 + row for row in loaded.rows.tolist()], loaded))
    assert torch.equal(batch["inclusion"], loaded.inclusion) and torch.equal(batch["planned"], loaded.planned)
    assert sorted([*batch["sample_id"].tolist(), *batch["unloaded_id"].tolist()]) == list(range(100, 108))
    assert set(BlockCollator(collate)([1, 2])) == {"sample_id"}


@pytest.mark.parametrize(
    ("ratio", "size", "wanted"), [(0.5, 9, 4), (0.5, 3, 2), (0.1, 4, 2), (1.0, 5, 5), (0.9, 1, 1)]
)
def test_number_of_pairs_to_keep(ratio, size, wanted):
    assert count_selected(ratio, size) == wanted
