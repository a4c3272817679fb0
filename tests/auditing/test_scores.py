"""The score against its formula, and how well it finds what was mismatched on purpose."""

import math

import pytest
import torch
from testing.made_embeddings import make_embeddings_of_pairs as embeddings

from hf_dissect.auditing.scores import score_matches
from hf_dissect.evaluation import noise_detection_metrics


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
    # Three standard errors of the mean and of the standard deviation of 400 scores.
    mean, std = found.chance.mean().item(), found.chance.std().item()
    assert found.score.mean().item() == pytest.approx(mean, abs=3 * std / 400**0.5)
    assert found.score.std().item() == pytest.approx(std, rel=3 / 800**0.5)
    # A pair with the same caption is no stranger: of two captions, all chances are with the other one.
    keys = torch.arange(400) % 2
    two = score_matches(image, text[:2][keys], logit_scale=10.0, caption_key=keys)
    assert len(two.chance) < len(found.chance)


def test_hubs_are_corrected_for():
    image, text, is_clean = embeddings(1000, 0.3, hubs=3.0)
    found = score_matches(image, text, logit_scale=15.0)
    by_score, by_cosine = (
        noise_detection_metrics(values, is_clean)["auroc"] for values in (found.score, (image * text).sum(1))
    )
    assert by_score > 0.93 > 0.85 > by_cosine


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
