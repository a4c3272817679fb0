import pytest
import torch
from testing.written_out_selection import own_losses, scores_of

from hf_dissect.selection import SampleLedger, make_strategy


def best(values, k):
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_minus_that_of_the_reference_in_the_same_batch(kind):
    learner, reference = scores_of(0, kind=kind), scores_of(1, kind=kind)
    learner.reference = reference
    wanted = [own - other for own, other in zip(own_losses(learner), own_losses(reference), strict=True)]
    selection = make_strategy("learnability").select(learner, SampleLedger(columns=("reference_evidence",)), 5)
    assert selection.priority.tolist() == pytest.approx(wanted, abs=1e-4)
    assert selection.indices.tolist() == best(wanted, 5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_evidence_gives_the_loss_that_it_was_made_of(kind):
    learner, reference = scores_of(0, kind=kind), scores_of(1, kind=kind)
    strategy, ledger = make_strategy("learnability"), SampleLedger(200, columns=("reference_evidence",))
    for name, values in strategy.measure_reference(reference).items():
        ledger.write(name, reference.sample_id, values)
    wanted = [own - other for own, other in zip(own_losses(learner), own_losses(reference), strict=True)]
    assert strategy.select(learner, ledger, 5).priority.tolist() == pytest.approx(wanted, abs=1e-3)


def test_evidence_found_among_many_serves_a_small_batch():
    """The reference meets the pairs among 400; its loss among 20 of them follows, up to the luck of the strangers."""
    learner, reference = scores_of(0, 400, dim=64), scores_of(1, 400, dim=64, noise=0.3)
    strategy, ledger = make_strategy("learnability"), SampleLedger(600, columns=("reference_evidence",))
    evidence = strategy.measure_reference(reference)["reference_evidence"]
    ledger.write("reference_evidence", reference.sample_id, evidence)
    part = torch.arange(20)
    small, small_reference = learner.subset(part), torch.tensor(own_losses(reference.subset(part)))
    recovered = small.own_loss - strategy.select(small, ledger, 5).priority
    assert (recovered - small_reference).abs().mean() < 0.25 * small_reference.mean()
    # The loss among all does not serve.
    assert (reference.own_loss[:20] - small_reference).abs().mean() > small_reference.mean()


def test_a_pair_without_evidence_is_neutral_and_a_batch_without_any_random():
    learner, strategy = scores_of(0), make_strategy("learnability")
    ledger = SampleLedger(200, columns=("reference_evidence",))
    chosen = {tuple(strategy.select(learner, ledger, 3).indices.tolist()) for _ in range(20)}
    assert len(chosen) > 10
    ledger.write("reference_evidence", learner.sample_id[:11], torch.linspace(-5, 5, 11))
    priority = strategy.select(learner, ledger, 3).priority
    assert priority[11] == priority[:11].median()


def test_reducible_loss_is_fixed_at_the_first_batch():
    strategy, ledger = make_strategy("rho"), SampleLedger(columns=("reference_loss",))
    learner, first = scores_of(0), scores_of(1)
    learner.reference = first
    selection = strategy.select(learner, ledger, 4)
    wanted = [own - other for own, other in zip(own_losses(learner), own_losses(first), strict=True)]
    assert selection.priority.tolist() == pytest.approx(wanted, abs=1e-4) and selection.indices.tolist() == best(
        wanted, 4
    )
    strategy.record(learner.sample_id, learner.correlation, ledger, strategy.measure(learner, ledger))
    assert ledger.column("reference_loss").tolist() == pytest.approx(own_losses(first), abs=1e-4)

    later = scores_of(2)
    later.reference = scores_of(3)  # another loss, of the batch of the moment
    wanted = [own - other for own, other in zip(own_losses(later), own_losses(first), strict=True)]
    assert strategy.select(later, ledger, 4).priority.tolist() == pytest.approx(wanted, abs=1e-4)
    strategy.record(later.sample_id, later.correlation, ledger, strategy.measure(later, ledger))
    assert ledger.column("reference_loss").tolist() == pytest.approx(own_losses(first), abs=1e-4)
    later.reference = None  # known from the pass before training
    assert strategy.select(later, ledger, 4).priority.tolist() == pytest.approx(wanted, abs=1e-4)
    assert strategy.measure(later, ledger) == {}


def test_the_sum_over_the_row_is_the_irreducible_sigmoid_loss():
    scores = scores_of(4, kind="sigmoid")
    assert make_strategy("rho").measure_reference(scores)["reference_loss"].equal(scores.loss)
