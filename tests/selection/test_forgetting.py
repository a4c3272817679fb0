"""Forgetting events: learnt at one visit, not at the next."""

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.losses import contrastive
from hf_dissect.selection import CandidateScores, SampleLedger, forgetting, make_strategy

IDS = torch.arange(70, 76)


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(200, columns=("correlation", "learnt", "forgotten"))


def test_events_are_counted_as_in_the_paper(ledger):
    strategy = make_strategy("forgetting")
    visits = torch.tensor(
        [
            [1, 1, 1, 1],  # never forgotten
            [0, 1, 0, 1],  # once
            [1, 0, 1, 0],  # twice
            [0, 0, 0, 0],  # never learnt
            [0, 0, 0, 1],  # learnt late, never forgotten
            [1, 0, 0, 0],  # once, although it never came back
        ]
    )
    for visit in visits.T:
        strategy.record(IDS, torch.zeros(6), ledger, {"learnt": visit.float()})
    assert ledger.read("forgotten", IDS).tolist() == [0, 1, 2, float("inf"), 0, 1]
    strategy.record(IDS, torch.zeros(6), ledger)  # pairs that were not scored
    assert ledger.read("forgotten", IDS).tolist() == [0, 1, 2, float("inf"), 0, 1]


def keeps(strategy, ledger, k: int, seed: int = 0) -> list[int]:
    strategy.generator.manual_seed(seed)
    return strategy.select(CandidateScores(IDS), ledger, k).indices.tolist()


def test_the_most_often_forgotten_stay(ledger):
    counts = torch.tensor([0.0, 3, 2, float("inf"), 1, 5])
    ledger.write("forgotten", IDS, counts)
    first, last = make_strategy("forgetting"), make_strategy("forgetting", never_learnt="last")
    assert [keeps(first, ledger, k) for k in (1, 2, 3, 4)] == [[3], [3, 5], [1, 3, 5], [1, 2, 3, 5]]
    assert [keeps(last, ledger, k) for k in (1, 2, 3, 5)] == [[5], [1, 5], [1, 2, 5], [0, 1, 2, 4, 5]]
    priority = first.select(CandidateScores(IDS), ledger, 2).priority
    assert priority.tolist() == [0, 3, 2, 6, 1, 5]  # finite, for the figures of the ranking


def test_unseen_pairs_are_neutral_and_equals_random(ledger):
    strategy = make_strategy("forgetting")
    assert len({tuple(keeps(strategy, ledger, 2, seed)) for seed in range(20)}) > 5  # nothing was seen yet
    ledger.write("forgotten", IDS[:5], torch.tensor([0.0, 0, 4, 7, 7]))
    assert strategy.select(CandidateScores(IDS), ledger, 3).priority[5] == 4
    assert keeps(strategy, ledger, 2) == [3, 4]
    assert {tuple(keeps(strategy, ledger, 3, seed)) for seed in range(20)} == {(2, 3, 4), (3, 4, 5)}
    never = make_strategy("forgetting", never_learnt="last")
    ledger.write("forgotten", IDS, torch.full((6,), torch.inf))
    assert len({tuple(keeps(never, ledger, 2, seed)) for seed in range(20)}) > 5


@pytest.mark.parametrize("block", [2**24, 12, 1])
def test_a_pair_is_learnt_if_both_rank_each_other_first(block, monkeypatch, ledger):
    monkeypatch.setattr(forgetting, "MAX_LOGITS", block)
    torch.manual_seed(0)
    image = F.normalize(torch.randn(9, 5), dim=-1)
    text = F.normalize(image + 0.6 * torch.randn(9, 5), dim=-1)
    image[8], text[7] = image[0], text[1]  # an image with two captions, a caption with two images
    text[8] = text[0]
    expected = []
    for i in range(9):
        own = float(image[i] @ text[i])
        best_image = max(float(text[i] @ other) for other in image)
        best_text = max(float(image[i] @ other) for other in text)
        expected.append(own >= best_image - 1e-6 and own >= best_text - 1e-6)
    assert 0 < sum(expected) < 9 and contrastive.MAX_LOGITS == 2**24
    scores = CandidateScores(torch.arange(9), image, text)
    assert make_strategy("forgetting").measure(scores, ledger)["learnt"].bool().tolist() == expected


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match="never_learnt='middle' is not allowed; allowed: first, last"):
        make_strategy("forgetting", never_learnt="middle")
