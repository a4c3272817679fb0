"""The score against its formula, and how well score and probabilities find what was mismatched on purpose."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from hf_dissect.auditing.scores import (
    MatchScores,
    estimate_mismatched_probability,
    estimate_mismatched_share,
    score_matches,
)
from hf_dissect.evaluation import noise_detection_metrics


def embeddings(count: int, rate: float, *, hubs: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Images `(count, 32)`, texts near theirs, and which belong together; `hubs` adds what all have in common."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 32, generator=generator)
    text = image + 0.8 * torch.randn(count, 32, generator=generator)
    wrong = torch.randperm(count, generator=generator)[: round(rate * count)]
    text[wrong] = text[wrong.roll(1)]
    is_clean = torch.ones(count, dtype=torch.bool)
    is_clean[wrong] = False
    common = torch.ones(32)
    image += hubs * torch.rand(count, 1, generator=generator) * common
    text += hubs * torch.rand(count, 1, generator=generator) * common
    return normalize(image, dim=1), normalize(text, dim=1), is_clean


def test_the_score_is_what_the_formula_says():
    image, text, _ = embeddings(12, 0.25)
    image_key = torch.tensor([0, 0, *range(1, 11)])  # the first two pairs share an image
    caption_key = torch.tensor([*range(10), 9, 10])  # pairs 9 and 10 a caption
    found = score_matches(
        image, text, logit_scale=7.0, image_key=image_key, caption_key=caption_key, num_references=12, block_size=5
    )
    logits = (7.0 * image @ text.T).tolist()
    for i in range(12):
        others = [j for j in range(12) if image_key[i] != image_key[j] and caption_key[i] != caption_key[j]]
        of_image = math.log(sum(math.exp(logits[i][j]) for j in others) / len(others))
        of_text = math.log(sum(math.exp(logits[j][i]) for j in others) / len(others))
        assert len(others) == (10 if i in (0, 1, 9, 10) else 11)
        assert found.score[i].item() == pytest.approx(logits[i][i] - (of_image + of_text) / 2, abs=1e-4)


def test_neither_blocks_nor_the_order_of_references_matter():
    image, text, _ = embeddings(100, 0.2)
    whole = score_matches(image, text, logit_scale=10.0)
    blocks = score_matches(image, text, logit_scale=10.0, block_size=7, seed=5)
    torch.testing.assert_close(blocks.score, whole.score)
    sample = score_matches(image, text, logit_scale=10.0, num_references=50)
    assert 0 < (sample.score - whole.score).abs().mean() < 0.5


def test_chance_are_the_scores_of_strangers():
    image, text, _ = embeddings(400, 0.0)
    found = score_matches(image, text.roll(3, 0), logit_scale=10.0)  # all mismatched
    assert found.score.mean().item() == pytest.approx(found.chance.mean().item(), abs=0.1)
    assert found.score.std().item() == pytest.approx(found.chance.std().item(), rel=0.1)
    # A pair with the same caption is no stranger: of two captions, all chances are with the other one.
    keys = torch.arange(400) % 2
    two = score_matches(image, text[:2][keys], logit_scale=10.0, caption_key=keys)
    assert len(two.chance) < len(found.chance)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.7, 1.0])
def test_share_and_probabilities_are_those_of_the_truth(rate):
    image, text, is_clean = embeddings(2000, rate)
    found = score_matches(image, text, logit_scale=10.0)
    probability = torch.from_numpy(estimate_mismatched_probability(found))
    assert estimate_mismatched_share(found) == pytest.approx(rate, abs=0.04)
    assert probability.mean().item() == pytest.approx(rate, abs=0.04)
    assert ((probability > 0.5) == ~is_clean).float().mean() > 0.96
    order = found.score.argsort()
    assert (probability[order].diff() <= 0).all()


def test_hubs_are_corrected_for():
    image, text, is_clean = embeddings(1000, 0.3, hubs=3.0)
    found = score_matches(image, text, logit_scale=15.0)
    by_score, by_cosine = (
        noise_detection_metrics(values, is_clean)["auroc"] for values in (found.score, (image * text).sum(1))
    )
    assert by_score > 0.93 > 0.85 > by_cosine


def test_the_wider_group_has_both_tails_and_yet_the_probability_falls():
    generator = torch.Generator().manual_seed(0)
    matched, strange = torch.randn(900, generator=generator) * 4, torch.randn(300, generator=generator) / 2 - 5
    chance = torch.randn(5000, generator=generator) / 2 - 5
    score = torch.cat([matched, strange, torch.tensor([-20.0, 20.0])])
    probability = torch.from_numpy(estimate_mismatched_probability(MatchScores(score, chance)))
    assert probability[-2] == probability.max() > 0.5 and probability[-1] == probability.min() < 0.01
    assert (probability[score.argsort()].diff() <= 0).all()


def test_a_caption_that_most_pairs_share_gets_a_finite_score():
    image, text, _ = embeddings(30, 0.0)
    found = score_matches(
        image, text, logit_scale=10.0, caption_key=torch.zeros(30).long().index_fill(0, torch.tensor([4]), 1)
    )
    assert found.score.isfinite().all()
    with pytest.raises(ValueError, match="the same image, or the same caption"):
        score_matches(image, text, logit_scale=10.0, caption_key=torch.zeros(30).long())


def test_too_few_pairs_and_a_diverged_model_are_refused():
    image, text, _ = embeddings(10, 0.0)
    image[3] = torch.nan
    with pytest.raises(ValueError, match="image_embeds holds NaN or infinite numbers in 1 of 10 rows"):
        score_matches(image, text, logit_scale=10.0)
    image, text, _ = embeddings(9, 0.0)
    with pytest.raises(ValueError, match="9 readable pairs are too few"):
        score_matches(image, text, logit_scale=10.0)
