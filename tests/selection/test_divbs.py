"""DivBS: the greedy choice, against Gram-Schmidt written out."""

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy
from hf_dissect.selection.divbs import choose_diverse


def written_out(features: torch.Tensor, k: int) -> list[int]:
    """Take the feature whose new direction has the largest product with the sum of all; orthogonalise; repeat."""
    features = features.double()
    total, rest, chosen = features.sum(0), features.clone(), []
    for _ in range(k):
        gains = {}
        for place, vector in enumerate(rest):
            if place not in chosen and vector.norm() > 1e-5:
                gains[place] = abs(float(vector @ total / vector.norm()))
        best = max(gains, key=lambda place: gains[place])
        chosen.append(best)
        direction = rest[best] / rest[best].norm()
        rest = rest - torch.outer(rest @ direction, direction)
    return chosen


@pytest.mark.parametrize(("pairs", "dim", "k"), [(12, 8, 5), (30, 6, 11), (7, 16, 7), (40, 40, 3)])
def test_the_choice_is_that_of_gram_schmidt(pairs, dim, k):
    torch.manual_seed(pairs)
    image, text = (F.normalize(torch.randn(pairs, dim), dim=-1) for _ in range(2))
    features = torch.cat([image, text], 1)
    assert k <= 2 * dim
    expected = written_out(features, k)
    assert choose_diverse(features, k).tolist() == expected
    scores = CandidateScores(torch.arange(pairs), image, text)
    selection = make_strategy("divbs").select(scores, SampleLedger(pairs), k)
    assert selection.indices.tolist() == sorted(expected) and selection.weights is None


def test_nothing_is_said_twice():
    base = torch.eye(4)
    features = torch.cat([base[:1].repeat(5, 1), base[1:2].repeat(3, 1), base[2:3], base[3:]])
    chosen = choose_diverse(features, 4)
    assert sorted(features[chosen].argmax(1).tolist()) == [0, 1, 2, 3]
    assert features[chosen].argmax(1).tolist()[:2] == [0, 1]  # what most of the batch says comes first


def test_the_search_begins_again_when_all_directions_are_taken():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(30, 4), dim=-1)
    chosen = choose_diverse(features, 11).tolist()
    assert len(set(chosen)) == 11
    left = [place for place in range(30) if place not in chosen[:4]]
    total = features.sum(0)
    assert chosen[4] == max(left, key=lambda place: abs(float(features[place] @ total)))
    same = torch.ones(6, 3)  # every candidate says the same
    assert sorted(choose_diverse(same, 6).tolist()) == list(range(6))


def test_many_steps_stay_orthogonal():
    torch.manual_seed(1)
    features = F.normalize(torch.randn(300, 64) + 3, dim=-1)  # all in nearly one direction
    assert choose_diverse(features, 60).tolist() == written_out(F.normalize(features, dim=-1), 60)
