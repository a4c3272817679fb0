import logging

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from hf_dissect.selection import SampleLedger, SoftLabels
from hf_dissect.selection.soft_labels import compute_upper_posterior

BETA = 0.7


def two_groups(size: int = 200, seed: int = 0) -> np.ndarray:
    """Values of which two fifths are lower."""
    random = np.random.default_rng(seed)
    means = np.where(np.arange(size) % 5 < 2, 0.2, 0.6)
    return (means + 0.08 * random.normal(size=size)).astype(np.float32)


def written_out_posterior(values: np.ndarray, low: float, high: float, seed: int) -> np.ndarray:
    """Of the fitted mixture's component with the higher mean, by Bayes' rule."""
    low, high = float(low), float(high)
    scaled = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed).fit(scaled[:, None])
    means, variances = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
    densities = np.exp(-((scaled[:, None] - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
    joint = mixture.weights_ * densities
    return joint[:, means.argmax()] / joint.sum(1)


@pytest.mark.parametrize("seed", [0, 7])
def test_posterior_is_that_of_the_upper_component(seed):
    values = two_groups()
    found = compute_upper_posterior(values, seed=seed)
    assert np.allclose(found, written_out_posterior(values, values.min(), values.max(), seed), rtol=0, atol=1e-10)
    upper = np.arange(200) % 5 >= 2
    assert found[upper].min() > 0.5 > found[~upper].max()


def test_the_seed_decides_where_the_mixture_starts():
    values = np.random.default_rng(0).exponential(size=60)
    found = [compute_upper_posterior(values, seed=seed) for seed in (0, 1, 0)]
    for seed, posterior in enumerate(found[:2]):
        expected = written_out_posterior(values, values.min(), values.max(), seed)
        assert np.allclose(posterior, expected, rtol=0, atol=1e-10)
    assert np.array_equal(found[0], found[2]) and abs(found[0] - found[1]).max() > 0.1


def test_where_an_outlier_hides_the_groups_all_pairs_count():
    assert (compute_upper_posterior(np.append(two_groups(), -100)) == 1).all()


def test_the_same_seed_gives_the_same_numbers_whatever_the_number_of_threads_and_the_global_random_state():
    values = two_groups(5000)
    threads = torch.get_num_threads()
    np.random.seed(1)
    first = compute_upper_posterior(values, seed=3)
    try:
        torch.set_num_threads(4)
        np.random.seed(2)
        assert np.array_equal(compute_upper_posterior(values, seed=3), first)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full(50, 0.3), "all values are the same, 0.3"),
        (0.3 + 1e-8 * np.arange(50), "all values are the same, 0.3"),
        (np.linspace(0, 1, 9), "at least 10 are needed"),
        (np.append(np.linspace(0, 1, 49), np.nan), "1 values are not finite"),
        (np.append(np.linspace(0, 1, 48), [np.inf, -np.inf]), "2 values are not finite"),
    ],
)
def test_without_two_components_all_are_of_the_upper_one_and_the_reason_is_told(values, reason, caplog):
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(compute_upper_posterior(values), np.ones(len(values)))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.getMessage()
    assert f"among {len(values)} pairs" in record.getMessage()


def test_a_component_of_one_outlier_is_none(caplog):
    values = np.append(two_groups(), 100)
    assert (compute_upper_posterior(values) == 1).all()
    assert "a share of 0.005 only" in caplog.records[0].getMessage()


def test_ten_pairs_are_enough():
    assert compute_upper_posterior(np.repeat([0.0, 1.0], 5)).round(6).tolist() == [0] * 5 + [1] * 5


def test_labels_follow_the_moving_averages_over_two_updates():
    ledger, labels = SampleLedger(60, SoftLabels.columns), SoftLabels(BETA, seed=5)
    everyone = torch.arange(60)
    assert labels.of(ledger, everyone).tolist() == [1.0] * 60
    y_cm, y_im = np.ones(60), np.ones(60)
    for epoch in range(2):
        structure, agreement = two_groups(60, epoch), np.random.default_rng(epoch).random(60).astype(np.float32)
        labels.record(ledger, everyone, torch.from_numpy(agreement), torch.from_numpy(structure))
        before = labels.of(ledger, everyone)
        labels.update(ledger)
        posterior = written_out_posterior(structure, structure.min(), structure.max(), 5)
        y_cm = BETA * agreement + (1 - BETA) * y_cm
        y_im = BETA * posterior + (1 - BETA) * y_im
        found = labels.of(ledger, everyone)
        assert np.allclose(found.numpy(), np.minimum(y_cm, y_im), rtol=0, atol=1e-6)
        assert not found.equal(before) and found.dtype == torch.float32
        assert np.allclose(ledger.column("y_im").numpy(), y_im, rtol=0, atol=1e-6)
    order = torch.tensor([7, 3, 7])
    assert labels.of(ledger, order).equal(found[order])


@pytest.mark.parametrize("num_samples", [60, None])
def test_only_pairs_that_were_seen_since_the_last_update_are_fitted_and_change(num_samples):
    ledger, labels = SampleLedger(num_samples, SoftLabels.columns), SoftLabels(BETA)
    everyone = torch.arange(60)
    structure = torch.from_numpy(two_groups(60))
    labels.record(ledger, everyone, torch.rand(60), structure)
    labels.update(ledger)
    first = labels.of(ledger, everyone)
    assert ledger.column("agreement").isnan().all() and ledger.column("structure").isnan().all()
    labels.update(ledger)  # nothing was seen: nothing changes
    assert labels.of(ledger, everyone).equal(first)

    seen, unseen = everyone[20:], everyone[:20]
    old_y_im = ledger.read("y_im", seen)
    labels.record(ledger, seen, torch.rand(40), structure[20:])
    labels.update(ledger)
    assert labels.of(ledger, unseen).equal(first[:20])
    part = structure[20:].numpy()
    expected = BETA * written_out_posterior(part, part.min(), part.max(), 0) + (1 - BETA) * old_y_im.numpy()
    assert np.allclose(ledger.read("y_im", seen).numpy(), expected, rtol=0, atol=1e-6)


def test_the_last_evidence_of_an_epoch_counts_and_unknown_ids_have_the_label_one():
    ledger, labels = SampleLedger(columns=SoftLabels.columns), SoftLabels(beta=1.0)
    for agreement in (0.9, 0.25):
        labels.record(ledger, torch.tensor([10**12, 5]), torch.full((2,), agreement), torch.rand(2))
    labels.update(ledger)
    assert labels.of(ledger, torch.tensor([5, 77, 10**12])).tolist() == [0.25, 1.0, 0.25]


def test_a_fallback_leaves_the_structures_label_at_one_and_still_follows_the_agreement(caplog):
    ledger, labels = SampleLedger(30, SoftLabels.columns), SoftLabels(BETA)
    labels.record(ledger, torch.arange(30), torch.full((30,), 0.5), torch.full((30,), 0.8))
    labels.update(ledger)
    assert ledger.column("y_im").tolist() == [1.0] * 30
    assert labels.of(ledger, torch.arange(30)).tolist() == pytest.approx([0.7 * 0.5 + 0.3] * 30)
    assert len(caplog.records) == 1


def test_labels_outlast_saving_the_ledger(tmp_path):
    ledger, labels = SampleLedger(60, SoftLabels.columns), SoftLabels(BETA)
    everyone, structure = torch.arange(60), torch.from_numpy(two_groups(60))
    labels.record(ledger, everyone, torch.rand(60), structure)
    labels.update(ledger)
    labels.record(ledger, everyone[:30], torch.rand(30), structure[:30])
    ledger.save(tmp_path / "ledger.safetensors")
    restored = SampleLedger(60, SoftLabels.columns)
    restored.load(tmp_path / "ledger.safetensors")
    for each in (ledger, restored):
        SoftLabels(BETA).update(each)
    assert labels.of(restored, everyone).equal(labels.of(ledger, everyone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": 1.1}, "beta=1.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SoftLabels(**options)
