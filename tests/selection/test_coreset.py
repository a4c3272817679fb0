import pytest
import torch
from testing.written_out_selection import own_losses, scores_of

from hf_dissect.selection import SampleLedger, make_strategy
from hf_dissect.selection.coreset import CoresetSampler


def test_scores_are_the_cosine_or_the_loss():
    scores = scores_of(0, noise=3.0)
    cosine = [100 * float(a @ b) for a, b in zip(scores.image_embeds, scores.text_embeds, strict=True)]
    assert min(cosine) < 0  # not clipped, so that no two pairs are equal
    found = make_strategy("coreset").measure_reference(scores)["coreset_score"]
    assert found.tolist() == pytest.approx(cosine, abs=1e-4)
    found = make_strategy("coreset", score="clip_loss").measure_reference(scores)["coreset_score"]
    assert found.tolist() == pytest.approx([-loss for loss in own_losses(scores)], abs=1e-4)
    with pytest.raises(ValueError, match="score='loss' is not allowed; allowed: clipscore, clip_loss"):
        make_strategy("coreset", score="loss")


@pytest.mark.parametrize(("count", "ratio"), [(40, 0.3), (7, 0.5), (100, 1.0), (33, 0.01)])
def test_the_sampler_draws_the_best_of_all_pairs_each_epoch_in_another_order(count, ratio):
    ids = torch.arange(count) * 11 + 3
    ledger = SampleLedger(columns=("correlation", "coreset_score"))
    sampler = CoresetSampler(ledger, ids, ratio, seed=4)  # made before there are scores
    score = torch.randn(count, generator=torch.Generator().manual_seed(1))
    score[0] = torch.nan  # unreadable
    ledger.write("coreset_score", ids.flip(0), score.flip(0))
    size = max(2, round(ratio * count))
    best = sorted(range(count), key=lambda i: -score[i] if i else torch.inf)[:size]
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == sorted(best) and len(sampler) == size
    assert orders[0] == orders[2] and (orders[0] != orders[1] or size < 4)
