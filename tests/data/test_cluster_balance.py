"""Visits of balanced pairs: shares of clusters and counts of pairs are their expectations, rounded down or up."""

import math

import numpy as np
import pytest
from datasets import Dataset

from hf_dissect.data.balanced_order import BalancedSampler, deal_to_batches
from hf_dissect.data.cluster_balance import find_power_weights, find_visits, make_balance, name_cluster, read_clusters
from hf_dissect.data.sampling_file import read_sampling_file, write_cluster_weights, write_sampling_file

EPOCHS = 7


def sampler_of(sizes, strength=0.5, most=8, batch_size=16, seed=0) -> BalancedSampler:
    codes = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    weights = find_power_weights(np.array(sizes), strength)
    return BalancedSampler(make_balance(codes, weights, most, list("abcdefgh"[: len(sizes)])), batch_size, seed)


def epochs_of(sampler, epochs=EPOCHS) -> list[np.ndarray]:
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(np.fromiter(sampler, int))
    return found


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
def test_shares_follow_the_power_of_the_size(strength):
    sizes = np.array([400, 100, 25, 4])
    visits = find_visits(sizes, find_power_weights(sizes, strength), 1000)
    shares = sizes * visits / sizes.sum()
    expected = sizes ** (1 - strength) / (sizes ** (1 - strength)).sum()
    np.testing.assert_allclose(shares, expected)
    assert (np.diff(visits) >= -1e-12).all(), "smaller clusters are visited more often"


def test_a_cap_gives_what_is_left_to_the_others():
    sizes = np.array([900, 90, 10])
    visits = find_visits(sizes, find_power_weights(sizes, 1.0), 3)
    # The third cluster has 30 visits and the second 270; the first takes the other 700.
    np.testing.assert_allclose(visits, [700 / 900, 3, 3])
    np.testing.assert_allclose(find_visits(sizes, find_power_weights(sizes, 1.0), 1), 1)
    with pytest.raises(ValueError, match="only 10 of 1000 pairs have a weight above 0.*at most 8 times"):
        find_visits(sizes, np.array([0, 0, 1.0]), 8)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(700, 200, 60, 30, 8, 1, 1), (501, 499), (1000,), (1,) * 6 + (94,), (997, 1, 1, 1)])
def test_every_pair_and_cluster_has_its_visits_rounded_down_or_up(sizes, strength):
    sampler = sampler_of(sizes, strength)
    codes = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    visits = find_visits(np.array(sizes), find_power_weights(np.array(sizes), strength), 8)
    total = np.zeros(len(codes), int)
    for number, epoch in enumerate(epochs_of(sampler), start=1):
        assert len(epoch) == len(codes) == len(sampler)
        total += np.bincount(epoch, minlength=len(codes))
        expected = number * visits[codes]
        assert ((np.floor(expected + 1e-9) <= total) & (total <= np.ceil(expected - 1e-9))).all()
        of_clusters = np.bincount(codes, total)
        assert (np.abs(of_clusters - number * np.array(sizes) * visits) < 1).all()


@pytest.mark.parametrize("batch_size", [10, 16, 64, 333])
def test_no_batch_holds_a_pair_twice(batch_size):
    most = 1000 // batch_size - 1
    for epoch in epochs_of(sampler_of((700, 200, 60, 30, 8, 1, 1), 1.0, most=most, batch_size=batch_size)):
        batches = [epoch[start : start + batch_size] for start in range(0, 1000, batch_size)]
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
        assert np.bincount(epoch).max() > 1 or batch_size == 333
    sampler = sampler_of((700, 200, 60, 30, 8, 1, 1), 1.0, most=min(3, most), batch_size=batch_size)
    for epoch in epochs_of(sampler):
        batches = [epoch[start : start + batch_size] for start in range(0, 1000, batch_size)]
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
        if len(batches[-1]) < batch_size and batch_size < 64:  # processes fill it with pairs of the first batch
            assert not set(batches[0].tolist()) & set(batches[-1].tolist())


def test_dealing_keeps_the_visits_and_mixes_them():
    visits = np.repeat(np.arange(60), np.arange(60) % 4)
    dealt = deal_to_batches(visits, 13, np.random.default_rng(0))
    assert sorted(dealt) == sorted(visits) and dealt.tolist() != visits.tolist()
    assert sorted(deal_to_batches(np.arange(5), 13, np.random.default_rng(0))) == list(range(5))


def test_orders_follow_seed_and_epoch_and_nothing_else():
    first, second = (epochs_of(sampler_of((70, 20, 10))) for _ in range(2))
    assert all((one == other).all() for one, other in zip(first, second, strict=True))
    assert not (first[0] == first[1]).all()
    assert not (first[0] == epochs_of(sampler_of((70, 20, 10), seed=1))[0]).all()
    resumed = sampler_of((70, 20, 10))
    resumed.set_epoch(4)
    assert (np.fromiter(resumed, int) == first[4]).all()
    # Another number of ranks deals the same visits to other batches.
    other = epochs_of(sampler_of((70, 20, 10), batch_size=32))
    assert all(sorted(one) == sorted(two) for one, two in zip(first, other, strict=True))


def test_weights_of_single_pairs_fill_an_epoch_too():
    weights = np.random.default_rng(0).uniform(0, 4, 500)
    weights[:50] = 0
    balance = make_balance(np.zeros(0), weights, 6, by_pair=True)
    np.testing.assert_allclose(balance.visits_of_pairs.sum(), 500)
    expected = find_visits(np.ones(500), weights, 6)
    # Pairs of less than a visit together share it with pairs of nearly the same weight.
    np.testing.assert_allclose(balance.visits_of_pairs, expected, atol=0.1)
    total = sum(np.bincount(epoch, minlength=500) for epoch in epochs_of(BalancedSampler(balance, 16, 0), 20))
    assert (total[:50] == 0).all() and (np.abs(total - 20 * balance.visits_of_pairs) < 1 + 1e-9).all()


def test_clusters_are_text_or_whole_numbers_and_missing_ones_are_a_cluster():
    for values, names in (
        (["cat", None, "dog", "cat"], ["cat", "dog", None]),
        ([7, -1, 7, None], ["7", "-1", None]),
        ([7.0, 2.0, float("nan"), 7.0], ["7", "2", None]),
        (["", "a", "", "a"], ["", "a"]),
        ([None, None], [None]),
    ):
        found, codes = read_clusters(Dataset.from_dict({"cluster": values}), "cluster")
        assert found == names
        assert [found[code] for code in codes] == [name_cluster("cluster", value) for value in values]
    for values, message in (([1.5, 2.0], "not whole"), ([["a"], ["b"]], "holds list"), ([True, False], "holds bool")):
        with pytest.raises(ValueError, match=f"balance_column='cluster' holds .*{message.split()[-1]}"):
            read_clusters(Dataset.from_dict({"cluster": values}), "cluster")


def test_a_sampling_file_gives_back_what_was_written(tmp_path):
    codes = np.array([0, 0, 0, 1, 2, 2])
    balance = make_balance(codes, np.array([1.0, 2, 0.5]), 8, ["a", "b", None])
    write_sampling_file(tmp_path / "sampling.parquet", balance, None)
    for path in (tmp_path, tmp_path / "sampling.parquet"):
        weights = read_sampling_file(path)
        assert weights.num_samples == 6
        np.testing.assert_array_equal(weights.look_up(np.arange(6)), balance.visits_of_pairs)
        assert np.isnan(weights.look_up(np.array([6, -1]))).all()
        assert weights.clusters == {"a": balance.visits_of_pairs[0], "b": balance.visits_of_pairs[3], None: (
            balance.visits_of_pairs[4])}  # fmt: skip
    write_cluster_weights(tmp_path / "sizes.parquet", {"a": 90, 7: 10, None: 900}, strength=1.0)
    weights = read_sampling_file(tmp_path / "sizes.parquet")
    expected = dict(zip(["a", "7", None], find_visits([90, 10, 900], [1 / 90, 1 / 10, 1 / 900], 8), strict=True))
    assert weights.ids is None and weights.clusters == pytest.approx(expected)
    assert math.isclose(sum(size * expected[name] for name, size in {"a": 90, "7": 10, None: 900}.items()), 1000)
    (tmp_path / "by.json").write_text('{"cats": 0.5, "12": 2}')
    weights = read_sampling_file(tmp_path / "by.json")
    assert weights.clusters == {"cats": 0.5, "12": 2.0} and weights.look_up(np.array([12])).tolist() == [2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": -1}', "the weight -1 is not a finite number"),
        ('{"a": 0}', "no weight is above 0"),
        ('{"a": NaN}', "the weight nan is not"),
        ('{"a": "b"}', "JSON maps clusters or ids to weights"),
        ("[1, 2]", "JSON maps clusters or ids to weights"),
        ("{", "is not JSON"),
    ],
)
def test_files_without_usable_weights_are_refused(content, message, tmp_path):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sampling_file(tmp_path / "w.json")
    with pytest.raises(FileNotFoundError, match="found neither sampling.parquet nor another"):
        read_sampling_file(tmp_path / "nothing")
    (tmp_path / "sampling.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="holds no weights; it needs a column weight"):
        read_sampling_file(tmp_path)
