"""SCAN: what is marked, and how much of it is pruned in each epoch of a cycle."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy

PAIRS = 20


@pytest.fixture
def scores() -> CandidateScores:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(PAIRS, 8, generator=generator), dim=-1)
    text = F.normalize(image + 0.7 * torch.randn(PAIRS, 8, generator=generator), dim=-1)
    return CandidateScores(torch.arange(100, 100 + PAIRS), image, text, logit_scale=10.0)


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(200, columns=("correlation", "prunable"))


def visit(strategy, epoch, scores, ledger, ratio=0.5):
    """An epoch of one step, as a selector carries it out."""
    strategy.on_epoch_begin(epoch, ledger)
    k = round(strategy.choose_ratio(ratio) * scores.num_candidates)
    selection = strategy.select(scores, ledger, k)
    measured = strategy.measure(scores, ledger) if strategy.needs_scores(epoch) else {}
    strategy.record(scores.sample_id, scores.correlation, ledger, measured)
    return selection.indices


@pytest.mark.parametrize(("warmup", "cycle", "ratio"), [(1, 3, 0.5), (0, 1, 0.2), (2, 4, 0.7)])
def test_the_pruned_part_grows_as_a_cosine_over_the_cycle(warmup, cycle, ratio, ledger):
    strategy = make_strategy("scan", warmup_epochs=warmup, cycle=cycle)
    ratios, scored = [], []
    for epoch in range(warmup + 2 * (cycle + 1)):
        strategy.on_epoch_begin(epoch, ledger)
        ratios.append(strategy.choose_ratio(ratio))
        scored.append(strategy.needs_scores(epoch))
    parts = [(1 + math.cos(math.pi * (cycle - e) / cycle)) / 2 for e in range(1, cycle + 1)]
    one = [1.0, *(1 - part * (1 - ratio) for part in parts)]
    assert ratios == pytest.approx([1.0] * warmup + one * 2) and ratios[-1] == pytest.approx(ratio)
    assert scored == [False] * warmup + [True, *[False] * cycle] * 2


@pytest.mark.parametrize(("ill_matched", "ratio"), [(0.5, 0.5), (1.0, 0.7), (0.0, 0.4), (0.25, 0.6)])
def test_both_ends_of_the_loss_are_marked_and_pruned(ill_matched, ratio, scores, ledger):
    strategy = make_strategy("scan", warmup_epochs=0, cycle=2, ill_matched=ill_matched)
    assert len(visit(strategy, 0, scores, ledger, ratio)) == PAIRS
    logits = scores.text_embeds @ scores.image_embeds.T * 10
    order = (-(logits.log_softmax(1) + logits.log_softmax(0)).diagonal()).argsort(descending=True)
    count = round((1 - ratio) * PAIRS)
    ill = round(ill_matched * count)
    expected = torch.zeros(PAIRS)
    expected[order[:ill]] = 1
    expected[order.flip(0)[: count - ill]] = -1
    marks = ledger.read("prunable", scores.sample_id)
    assert marks.equal(expected)
    halfway = visit(strategy, 1, scores, ledger, ratio)  # half of the marked ones are pruned
    assert len(halfway) == round((1 - (1 - ratio) / 2) * PAIRS)
    assert set((marks == 0).nonzero().flatten().tolist()) <= set(halfway.tolist())
    assert visit(strategy, 2, scores, ledger, ratio).equal((marks == 0).nonzero().flatten())
    assert ledger.read("prunable", scores.sample_id).equal(marks)
    assert len(visit(strategy, 3, scores, ledger, ratio)) == PAIRS  # the next cycle


def test_a_random_part_is_pruned_and_unmarked_ones_only_if_need_be(scores, ledger):
    strategy = make_strategy("scan", warmup_epochs=0)
    strategy.on_epoch_begin(1, ledger)
    ledger.write("prunable", scores.sample_id[:8], torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1]))  # the others unseen
    chosen = set()
    for seed in range(20):
        strategy.generator.manual_seed(seed)
        kept = set(strategy.select(scores, ledger, 16).indices.tolist())
        assert set(range(8, PAIRS)) < kept
        chosen.add(tuple(sorted(kept)))
    assert len(chosen) > 10
    assert set(strategy.select(scores, ledger, 10).indices.tolist()) < set(range(8, PAIRS))


def test_no_marks_outside_of_the_epoch_for_them(scores, ledger):
    strategy = make_strategy("scan")
    for epoch, marks in {0: False, 1: True, 2: False, 4: False, 5: True}.items():
        strategy.on_epoch_begin(epoch, ledger)
        assert bool(strategy.measure(scores, ledger)) == marks


def test_impossible_options_are_named():
    for options in ({"cycle": 0}, {"ill_matched": 1.5}, {"warmup_epochs": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            make_strategy("scan", **options)
