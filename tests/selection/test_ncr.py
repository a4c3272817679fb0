import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture

from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy

PAIRS = 40
CLEAN = np.arange(PAIRS) % 4 != 0


@pytest.fixture
def scores() -> CandidateScores:
    """Of pairs whose text is their image's, or for every fourth that of another."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(PAIRS, 32, generator=generator), dim=-1)
    shuffled = torch.where(torch.tensor(CLEAN)[:, None], image, image.roll(4, 0))
    text = F.normalize(shuffled + 0.05 * torch.randn(PAIRS, 32, generator=generator), dim=-1)
    return CandidateScores(torch.arange(100, 100 + PAIRS), image, text, logit_scale=10.0)


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(200, columns=("correlation", "loss", "p_clean"))


def after_an_epoch(strategy, scores, ledger) -> None:
    strategy.on_epoch_begin(0, ledger)
    strategy.record(scores.sample_id, scores.correlation, ledger, strategy.measure(scores, ledger))
    strategy.update(ledger)
    strategy.on_epoch_begin(1, ledger)


def test_the_lower_component_of_the_losses_is_clean(scores, ledger):
    strategy = make_strategy("ncr", seed=3)
    losses = strategy.measure(scores, ledger)["loss"]
    logits = scores.text_embeds @ scores.image_embeds.T * 10
    both = [F.cross_entropy(side, torch.arange(PAIRS), reduction="none") for side in (logits, logits.T)]
    assert torch.allclose(losses, sum(both) / 2, atol=1e-5)
    after_an_epoch(strategy, scores, ledger)

    scaled = losses.double().numpy()
    scaled = ((scaled - scaled.min()) / (scaled.max() - scaled.min()))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=3).fit(scaled)
    expected = mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
    found = ledger.read("p_clean", scores.sample_id)
    assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert ledger.column("loss").isnan().all()
    kept = strategy.select(scores, ledger, int(CLEAN.sum())).indices
    assert kept.tolist() == np.flatnonzero(CLEAN).tolist()


def test_the_division_is_frozen_until_the_next_update(scores, ledger):
    strategy = make_strategy("ncr")
    after_an_epoch(strategy, scores, ledger)
    before = ledger.read("p_clean", scores.sample_id)
    kept = strategy.select(scores, ledger, 7).indices
    reversed_losses = {"loss": -strategy.measure(scores, ledger)["loss"]}
    strategy.record(scores.sample_id, scores.correlation, ledger, reversed_losses)
    assert strategy.select(scores, ledger, 7).indices.equal(kept)
    strategy.update(ledger)
    after = ledger.read("p_clean", scores.sample_id)
    assert (after[~CLEAN] > 0.5).all() and (before[~CLEAN] < 0.5).all()
    strategy.update(ledger)  # nothing was seen: nothing changes
    assert ledger.read("p_clean", scores.sample_id).equal(after)


def test_warmup_and_batches_without_a_division_are_random(scores, ledger):
    strategy = make_strategy("ncr", warmup_epochs=2)

    def number_of_choices() -> int:
        chosen = set()
        for seed in range(10):
            strategy.generator.manual_seed(seed)
            chosen.add(tuple(strategy.select(scores, ledger, 5).indices.tolist()))
        return len(chosen)

    strategy.on_epoch_begin(5, ledger)
    assert number_of_choices() > 5  # nothing is known yet
    after_an_epoch(strategy, scores, ledger)
    assert number_of_choices() > 5  # the second epoch of the warm-up
    strategy.on_epoch_begin(2, ledger)
    assert number_of_choices() == 1
    ledger.write("p_clean", scores.sample_id, torch.ones(PAIRS))
    assert number_of_choices() > 5  # no two components were found


def test_a_pair_without_a_probability_is_neutral(scores, ledger):
    strategy = make_strategy("ncr")
    strategy.on_epoch_begin(1, ledger)
    ledger.write("p_clean", scores.sample_id[:-1], torch.linspace(0, 1, PAIRS - 1))
    assert strategy.select(scores, ledger, 20).priority[-1] == pytest.approx(0.5)


def test_only_pairs_that_were_seen_since_the_last_update_change(scores, ledger):
    strategy = make_strategy("ncr")
    after_an_epoch(strategy, scores, ledger)
    first, losses = ledger.read("p_clean", scores.sample_id), strategy.measure(scores, ledger)["loss"]
    strategy.record(scores.sample_id[:20], scores.correlation[:20], ledger, {"loss": -losses[:20]})
    strategy.update(ledger)
    second = ledger.read("p_clean", scores.sample_id)
    assert second[20:].equal(first[20:]) and ((second[:20] > 0.5) != (first[:20] > 0.5)).all()


def test_pairs_that_train_unscored_leave_no_loss(scores, ledger):
    make_strategy("ncr").record(scores.sample_id, scores.correlation, ledger)
    assert ledger.column("loss").isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup_epochs": 0}, "warmup_epochs=0: ncr needs at least 1"), ({"seed": -1}, "seed=-1")],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy("ncr", **options)
