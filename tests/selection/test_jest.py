import itertools
import math
from collections import Counter

import pytest
import torch
from testing.written_out_selection import logits_of, scores_of, summed_loss

from hf_dissect.selection import SampleLedger, make_strategy
from hf_dissect.selection.jest import compute_logit_matrix, draw_for_sigmoid, draw_for_softmax

DRAWS = {"softmax": draw_for_softmax, "sigmoid": draw_for_sigmoid}


def chances_written_out(learner, reference, kind: str) -> dict[tuple[int, int], float]:
    """Chance of each sequence of two pairs, `exp(gain)`; the gain is the growth of the sub-batch's learnability."""
    size = len(learner)

    def learnability(chosen):
        return summed_loss(learner, chosen, kind) - summed_loss(reference, chosen, kind)

    first = torch.tensor([learnability([i]) for i in range(size)]).softmax(0).tolist()
    chances = {}
    for i in range(size):
        others = [j for j in range(size) if j != i]
        gains = torch.tensor([learnability([i, j]) - learnability([i]) for j in others]).softmax(0).tolist()
        chances |= {(i, j): first[i] * chance for j, chance in zip(others, gains, strict=True)}
    return chances


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_two_blocks_of_one_pair_are_drawn_with_the_written_out_chances(kind):
    learner, reference = scores_of(0, 4, kind), scores_of(5, 4, kind)
    chances = chances_written_out(logits_of(learner), logits_of(reference), kind)
    matrices = compute_logit_matrix(learner), compute_logit_matrix(reference)
    generator = torch.Generator().manual_seed(0)
    rounds = 3000
    drawn = Counter(tuple(DRAWS[kind](*matrices, k=2, chunks=2, generator=generator).tolist()) for _ in range(rounds))
    for pair in itertools.permutations(range(4), 2):
        spread = math.sqrt(chances[pair] * (1 - chances[pair]) / rounds)
        assert abs(drawn[pair] / rounds - chances[pair]) < 4.5 * spread + 1e-3, pair


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_third_block_counts_all_pairs_drawn_before(kind):
    """With so large differences that the best pair is certain, each block is the one that gains most."""
    learner, reference = scores_of(0, 6, kind), scores_of(5, 6, kind)
    learner.logit_scale, reference.logit_scale = 3000.0, 500.0
    matrices = compute_logit_matrix(learner), compute_logit_matrix(reference)
    drawn = DRAWS[kind](*matrices, k=4, chunks=4, generator=torch.Generator().manual_seed(3)).tolist()
    learner, reference = (matrix.double() for matrix in matrices)

    def learnability(chosen):
        total = 0.0
        for sign, logits in ((1, learner), (-1, reference)):
            part = logits[chosen][:, chosen]
            if kind == "sigmoid":
                signs = 2 * torch.eye(len(chosen)) - 1
                total += sign * float(torch.nn.functional.softplus(-signs * part).sum())
            else:
                rows, columns = part.logsumexp(1), part.logsumexp(0)
                total += sign * float(((rows + columns) / 2 - part.diagonal()).sum())
        return total

    for number in (1, 2, 3):
        before = drawn[:number]
        gains = {j: learnability([*before, j]) - learnability(before) for j in range(6) if j not in before}
        assert gains[drawn[number]] >= max(gains.values()) - 20


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("k", "chunks"), [(5, 16), (7, 3), (12, 16), (2, 1), (32, 16)])
def test_any_number_of_pairs_and_blocks(kind, k, chunks):
    learner = scores_of(0, max(k, 12), kind)
    learner.reference = scores_of(1, max(k, 12), kind)
    strategy = make_strategy("jest", chunks=chunks)
    chosen = []
    for seed in (1, 1, 2):
        strategy.generator.manual_seed(seed)
        chosen.append(strategy.select(learner, SampleLedger(), k).indices.tolist())
    assert chosen[0] == chosen[1] == sorted(set(chosen[0])) and len(chosen[0]) == k
    assert chosen[0] != chosen[2] or k == len(learner.sample_id)


def test_blocks_prefer_what_the_learner_lacks():
    """Pairs that the reference knows and the learner does not are drawn more often than pairs that neither knows."""
    learner, reference = scores_of(0, 64, "sigmoid", noise=50.0), scores_of(0, 64, "sigmoid", noise=50.0)
    reference.text_embeds = torch.cat([reference.image_embeds[:32], reference.text_embeds[32:]])
    learner.reference = reference
    strategy, hits = make_strategy("jest"), 0
    for seed in range(10):
        strategy.generator.manual_seed(seed)
        hits += int((strategy.select(learner, SampleLedger(), 16).indices < 32).sum())
    assert hits > 140  # of 160


def test_no_blocks_are_refused():
    with pytest.raises(ValueError, match="chunks=0 is not allowed; allowed: at least 1"):
        make_strategy("jest", chunks=0)
