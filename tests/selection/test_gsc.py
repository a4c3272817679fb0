import numpy as np
import pytest
import torch
from testing import written_out_gsc

from hf_dissect.selection import CandidateScores, SampleLedger, SoftLabels, make_strategy

PAIRS = 24


@pytest.fixture
def scores() -> CandidateScores:
    images, texts, _ = written_out_gsc.pairs(PAIRS, 6)
    embeds = (torch.tensor(side, dtype=torch.float32) for side in (images, texts))
    return CandidateScores(torch.arange(100, 100 + PAIRS), *embeds, logit_scale=10.0)


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(200, columns=("correlation", *SoftLabels.columns))


def set_labels(ledger: SampleLedger, sample_id: torch.Tensor, y_cm: torch.Tensor, y_im: torch.Tensor) -> None:
    ledger.write("y_cm", sample_id, y_cm)
    ledger.write("y_im", sample_id, y_im)


def test_the_largest_labels_are_kept_and_of_equal_ones_the_earlier(scores, ledger):
    y_cm, y_im = torch.full((PAIRS,), 0.5), torch.full((PAIRS,), 0.9)
    y_im[[3, 8]], y_cm[[5, 9, 11]] = 0.1, 0.8
    set_labels(ledger, scores.sample_id, y_cm, y_im)
    selection = make_strategy("gsc").select(scores, ledger, 5)
    assert selection.indices.tolist() == [0, 1, 5, 9, 11]
    assert selection.priority.equal(torch.minimum(y_cm, y_im))


def test_a_pair_without_labels_is_trusted(scores, ledger):
    known = scores.sample_id != 107
    set_labels(ledger, scores.sample_id[known], torch.full((PAIRS - 1,), 0.9), torch.full((PAIRS - 1,), 0.8))
    assert make_strategy("gsc").select(scores, ledger, 1).indices.tolist() == [7]


def test_equal_labels_select_at_random_by_the_own_generator(scores, ledger):
    strategy, chosen = make_strategy("gsc"), []
    for seed in (1, 2, 1):
        strategy.generator.manual_seed(seed)
        chosen.append(strategy.select(scores, ledger, 6).indices.tolist())
    assert chosen[0] == chosen[2] != chosen[1] and len(set(chosen[0])) == 6


def test_evidence_of_the_candidates_becomes_their_labels(scores, ledger):
    y = torch.linspace(0.2, 1, PAIRS)
    set_labels(ledger, scores.sample_id, y, torch.ones(PAIRS))
    strategy = make_strategy("gsc", temperature=0.2, beta=0.6)
    measured = strategy.measure(scores, ledger)
    mask = y.double().numpy()
    expected = written_out_gsc.evidence(
        scores.image_embeds.double().numpy(), scores.text_embeds.double().numpy(), mask, 0.2
    )
    for name, values in expected.items():
        assert np.allclose(measured[name].numpy(), values, atol=1e-6), name
    strategy.record(scores.sample_id, scores.correlation, ledger, measured)
    assert ledger.read("structure", scores.sample_id).equal(measured["structure"])
    strategy.update(ledger)
    found = ledger.read("y_cm", scores.sample_id).numpy()
    assert np.allclose(found, 0.6 * expected["agreement"] + 0.4 * y.numpy(), atol=1e-6)
    kept = strategy.select(scores, ledger, 8).indices
    labels = strategy.soft_labels.of(ledger, scores.sample_id)
    rest = [i for i in range(PAIRS) if i not in kept.tolist()]
    assert labels[kept].min() >= labels[rest].max()


def test_pairs_that_train_unscored_leave_no_evidence(scores, ledger):
    make_strategy("gsc").record(scores.sample_id, scores.correlation, ledger)
    assert ledger.column("agreement").isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0}, "temperature=0"), ({"beta": 2}, "beta=2"), ({"seed": -1}, "seed=-1")],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy("gsc", **options)
