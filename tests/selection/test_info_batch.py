"""InfoBatch: who is dropped, how the others weigh, and when nobody is."""

import json

import pytest
import torch

from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy

PAIRS = 12
IDS = torch.arange(50, 50 + PAIRS)
LOSSES = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 40, 50, float("nan")])  # mean 12.27, so nine lie below it
BELOW = LOSSES < LOSSES.nanmean()


@pytest.fixture
def ledger() -> SampleLedger:
    ledger = SampleLedger(200, columns=("correlation", "loss"))
    ledger.write("loss", IDS, LOSSES)
    return ledger


def begun(ledger: SampleLedger, **options):
    strategy = make_strategy("info_batch", **options)
    strategy.update(ledger)
    return strategy


def draw(strategy, ledger, k: int, seed: int = 0):
    strategy.generator.manual_seed(seed)
    return strategy.select(CandidateScores(IDS), ledger, k)


@pytest.mark.parametrize(("r", "k"), [(0.5, 6), (0.5, 9), (0.8, 6), (0.25, 3), (0.0, 5)])
def test_pairs_below_the_mean_are_dropped_and_the_kept_ones_rescaled(r, k, ledger):
    """Inclusion is c above the mean and c (1 - r) below it, at most 1, with c so that all sum to k."""
    strategy = begun(ledger, prune_probability=r)
    plain = torch.where(BELOW, 1 - r, 1.0)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * plain).clamp_max(1).sum() < k else (low, middle)
    inclusion = (low * plain).clamp_max(1)
    weights = torch.full((PAIRS,), torch.nan)
    counts, total, draws = torch.zeros(PAIRS), torch.zeros(PAIRS), 3000
    for seed in range(draws):
        selection = draw(strategy, ledger, k, seed)
        assert len(selection.indices) == k and selection.indices.tolist() == sorted(set(selection.indices.tolist()))
        counts[selection.indices] += 1
        total[selection.indices] += selection.weights / k
        weights[selection.indices] = selection.weights
    torch.testing.assert_close(weights, (k / PAIRS / inclusion).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(counts / draws, inclusion.float(), rtol=0, atol=0.04)
    # Unbiased: the mean of weight x loss over the kept is on average the mean of the losses of all.
    torch.testing.assert_close(total / draws, torch.full((PAIRS,), 1 / PAIRS), rtol=0.2, atol=0)
    if (inclusion < 1).all():
        assert weights[0] / weights[9] == pytest.approx(1 / (1 - r))


def test_a_pair_without_a_loss_counts_as_above_the_mean(ledger):
    weights = draw(begun(ledger, prune_probability=0.9), ledger, 4).weights
    assert weights.min() == pytest.approx(4 / PAIRS)  # of pairs that were certain to stay
    unknown = SampleLedger(200, columns=("correlation", "loss"))
    selection = draw(begun(unknown), unknown, 4)
    assert selection.weights.tolist() == pytest.approx([1.0] * 4)


def test_the_mean_is_that_of_the_last_epoch_and_is_resumed(ledger):
    strategy = begun(ledger)
    before = draw(strategy, ledger, 6, seed=3)
    ledger.write("loss", torch.arange(10), torch.full((10,), 1e4))  # the mean of the next epoch
    for resumed in (strategy, make_strategy("info_batch")):
        if resumed is not strategy:
            resumed.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
        after = draw(resumed, ledger, 6, seed=3)
        assert after.indices.equal(before.indices) and after.weights.equal(before.weights)
    strategy.update(ledger)
    assert draw(strategy, ledger, 12, seed=3).weights.unique().numel() == 1
    ten_times = [draw(strategy, ledger, 6, seed).weights.max() for seed in range(10)]
    assert max(ten_times) < before.weights.max()  # eleven of twelve lie below it now, so none can weigh as much
    fresh = make_strategy("info_batch")
    assert json.loads(json.dumps(fresh.state_dict())) == {"step": 0, "mean_loss": None}


def test_all_candidates_train_in_the_last_part_of_the_run(ledger):
    strategy = begun(ledger, annealing=0.75)
    strategy.begin_run(8)
    ratios = []
    for _ in range(8):
        strategy.begin_step()
        ratios.append(strategy.choose_ratio(0.5))
        assert strategy.needs_scores(0) == (ratios[-1] < 1)
    assert ratios == [0.5] * 6 + [1.0] * 2
    selection = draw(strategy, ledger, PAIRS)
    assert selection.indices.tolist() == list(range(PAIRS)) and selection.weights.tolist() == [1.0] * PAIRS
    strategy.begin_run(8)
    assert strategy.choose_ratio(0.5) == 0.5
    alone = make_strategy("info_batch")  # in a loop that does not know its length
    for _ in range(100):
        alone.begin_step()
    assert alone.choose_ratio(0.3) == 0.3


def test_losses_are_recorded(ledger):
    strategy = make_strategy("info_batch")
    strategy.record(IDS, torch.zeros(PAIRS), ledger, {"loss": torch.arange(PAIRS).float()})
    assert ledger.read("loss", IDS).tolist() == list(range(PAIRS))
    strategy.record(IDS, torch.zeros(PAIRS), ledger)
    assert ledger.read("loss", IDS).tolist() == list(range(PAIRS))


@pytest.mark.parametrize("options", [{"prune_probability": 1.0}, {"prune_probability": -0.1}, {"annealing": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        make_strategy("info_batch", **options)
