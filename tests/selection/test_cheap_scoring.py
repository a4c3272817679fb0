"""Candidates are scored on smaller pictures or fewer patches, and a share of the steps trains on such pictures."""

import pytest
import torch
import torch.nn.functional as F
from testing import tiny_models

from hf_dissect import OnlineSelector, SelectionCollator, forward_inputs
from hf_dissect.data import as_pairs
from hf_dissect.models.patch_tokens import shrink_pictures
from hf_dissect.selection.cheap_scoring import CheapScoring


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setattr(tiny_models, "PATCH_SIZE", 8)
    model, processor = tiny_models.tiny_clip()
    pairs = as_pairs(tiny_models.tiny_pairs(8))
    return model.train(), SelectionCollator(processor)([pairs[number] for number in range(8)])


def test_the_scores_are_those_of_smaller_pictures(setting):
    model, batch = setting
    selector = OnlineSelector("small_loss", 0.5, num_samples=8, cheap_scoring=CheapScoring(16))
    scores = selector.score(model, batch, batch["sample_id"])
    assert model.training
    pixels = F.interpolate(batch["pixel_values"], size=16, mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = model.eval().get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
        whole = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    torch.testing.assert_close(scores.image_embeds, F.normalize(wanted, dim=-1))
    assert not torch.allclose(scores.image_embeds, F.normalize(whole, dim=-1), atol=1e-2)


def test_the_scores_are_those_of_some_patches_and_draw_nothing(setting):
    model, batch = setting
    cheap = CheapScoring(patch_dropout=0.5)
    selector = OnlineSelector("small_loss", 0.5, num_samples=8, cheap_scoring=cheap)
    state, lengths = torch.get_rng_state(), []
    model.vision_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    first, second = (selector.score(model, batch, batch["sample_id"]) for _ in range(2))
    assert torch.equal(first.image_embeds, second.image_embeds) and torch.equal(state, torch.get_rng_state())
    model(**forward_inputs(model, batch))
    assert lengths == [9, 9, 17]


@pytest.mark.parametrize(("exposure", "steps"), [(0.25, [3, 7]), (0.0, []), (1.0, list(range(8))), (0.4, [2, 4, 7])])
def test_a_share_of_the_steps_trains_on_smaller_pictures(setting, exposure, steps):
    model, batch = setting
    selector = OnlineSelector("small_loss", 0.5, num_samples=8, cheap_scoring=CheapScoring(16, exposure=exposure))
    sides = [selector.select(model, batch, step=step)["pixel_values"].shape[-1] for step in range(8)]
    assert [step for step, side in enumerate(sides) if side == 16] == steps
    exposed = CheapScoring(16, exposure=1.0).expose(batch, 0)["pixel_values"]
    assert torch.equal(exposed, shrink_pictures(batch, 16)["pixel_values"])


def test_scores_of_two_kinds_of_pictures_are_not_compared(setting):
    model, _ = setting
    with pytest.raises(ValueError, match="rescore_every > 1"):
        OnlineSelector("small_loss", 0.5, num_samples=8, rescore_every=2, cheap_scoring=CheapScoring(16))
    with pytest.raises(ValueError, match="a reference model"):
        OnlineSelector("rho", 0.5, num_samples=8, reference=model, cheap_scoring=CheapScoring(16))
    OnlineSelector("rho", 0.5, num_samples=8, reference=model, cheap_scoring=CheapScoring())
