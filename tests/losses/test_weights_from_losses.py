"""Weights that are made from the losses of the pairs in the same forward pass."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.losses import ContrastiveLoss

IMAGE_KEY = torch.tensor([1, 1, 2, 3, 4])
CAPTION_KEY = torch.tensor([1, 2, 3, 4, 4])
COUNTS = {False: [5.0] * 5, True: [4.0, 4.0, 5.0, 4.0, 4.0]}  # without those that share an image or a caption


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_weights_are_made_from_the_losses_of_the_pairs(kind, with_logits, masked):
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    bias = bias if kind == "sigmoid" else torch.zeros_like(bias)
    logits = texts @ images.T * scale + bias
    outputs = {"image_embeds": images, "text_embeds": texts}
    if with_logits:
        outputs["logits_per_text"] = logits
    received = {}

    def weigh(losses, counts):
        received.update(losses=losses, counts=counts)
        return torch.exp(-losses)

    keys = {"image_key": IMAGE_KEY, "caption_key": CAPTION_KEY}
    loss = ContrastiveLoss(kind, masked)(outputs, scale=scale, bias=bias, weights=weigh, **keys)

    excluded = (IMAGE_KEY[:, None] == IMAGE_KEY) | (CAPTION_KEY[:, None] == CAPTION_KEY)
    excluded = (excluded & ~torch.eye(5, dtype=torch.bool)) if masked else torch.zeros(5, 5, dtype=torch.bool)
    if kind == "softmax":
        kept = logits.masked_fill(excluded, -math.inf)
        losses = -(kept.log_softmax(1).diagonal() + kept.log_softmax(0).diagonal()) / 2
        own = losses.detach()
    else:
        signs = 2 * torch.eye(5, dtype=torch.float64) - 1
        losses = F.softplus(-signs * logits).masked_fill(excluded, 0).sum(1)
        own = F.softplus(-logits.diagonal()).detach()
    torch.testing.assert_close(received["losses"], own)
    assert not received["losses"].requires_grad
    assert received["counts"].tolist() == COUNTS[masked]
    expected = (torch.exp(-own) * losses).mean()
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (images, texts), retain_graph=True),
        torch.autograd.grad(expected, (images, texts)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
