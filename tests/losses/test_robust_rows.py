"""The rows of RINCE and SymNCE, against their formulas; alone, in blocks, masked, and over several processes."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from testing.launched import on_ranks

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.robust_rows import rince_losses, symnce_losses

PAIRS, DIM = 12, 5
ROWS = {
    "rince": partial(rince_losses, q=0.4, lam=0.05),
    "rince, q = 1": partial(rince_losses, q=1.0, lam=1.0),
    "symnce": partial(symnce_losses, beta=0.6),
}
IMAGE_KEY = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8, 9, 5, 11])
CAPTION_KEY = torch.arange(100, 100 + PAIRS)
WEIGHTS = torch.linspace(0, 2, PAIRS)


def written_out(name: str, logits: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """The losses of the rows of `logits`, pair by pair."""
    losses = []
    for i, row in enumerate(logits):
        others = [j for j in range(len(row)) if j != i and not excluded[i, j]]
        if name == "symnce":
            total = sum(row[j].exp() for j in [i, *others])
            reverse = sum((row[j].exp() / total).log() for j in others) / len(others)
            losses.append(-(row[i].exp() / total).log() + 0.6 * reverse)
        else:
            q, lam = (0.4, 0.05) if name == "rince" else (1.0, 1.0)
            total = sum(row[j].exp() for j in [i, *others])
            losses.append(-((q * row[i]).exp()) / q + (lam * total) ** q / q)
    return torch.stack(losses)


def embeddings(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return F.normalize(torch.randn(2, PAIRS, DIM, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def loss_and_gradients(name, masked, block, rows, with_logits=False) -> list[torch.Tensor]:
    image, text = (side[rows].clone().requires_grad_() for side in embeddings())
    scale = torch.tensor(4.5, dtype=torch.float64, requires_grad=True)
    outputs = {"image_embeds": image, "text_embeds": text}
    if with_logits:
        outputs["logits_per_text"] = text @ image.T * scale
    loss = ContrastiveLoss("softmax", masked, block, ROWS[name])(
        outputs, scale=scale, weights=WEIGHTS[rows], image_key=IMAGE_KEY[rows], caption_key=CAPTION_KEY[rows]
    )
    loss.backward()
    return [loss.detach(), image.grad, text.grad, scale.grad]


def expected_of(name: str, masked: bool) -> list[torch.Tensor]:
    image, text = (side.clone().requires_grad_() for side in embeddings())
    scale = torch.tensor(4.5, dtype=torch.float64, requires_grad=True)
    excluded = (IMAGE_KEY[:, None] == IMAGE_KEY) & masked
    logits = text @ image.T * scale
    losses = (written_out(name, logits, excluded) + written_out(name, logits.T, excluded)) / 2
    loss = (losses * WEIGHTS).mean()
    loss.backward()
    return [loss.detach(), image.grad, text.grad, scale.grad]


@pytest.mark.parametrize(("name", "masked"), itertools.product(ROWS, (False, True)))
def test_rows_follow_the_formulas(name, masked):
    expected = expected_of(name, masked)
    for block, with_logits in itertools.product((2**24, 29, 1), (False, True)):
        found = loss_and_gradients(name, masked, block, slice(None), with_logits)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def compute_on_rank() -> dict:
    share = PAIRS // dist.get_world_size()
    rows, found = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share), {}
    for case in itertools.product(ROWS, (False, True), (2**24, 29)):
        means = []
        for part in loss_and_gradients(*case, rows):
            everyone = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, part)
            whole = torch.cat(everyone) if part.dim() else torch.stack(everyone).sum()
            means.append(whole / dist.get_world_size())  # as DDP takes them
        found[case] = means
    return found


def test_processes_agree_with_one_process_on_the_union(tmp_path):
    (found,) = on_ranks([2], tmp_path, compute_on_rank).values()
    assert len(found) == 12
    for (name, masked, _), parts in found.items():
        for got, wanted in zip(parts, expected_of(name, masked), strict=True):
            torch.testing.assert_close(got, wanted)


def test_rince_is_the_cross_entropy_for_small_q_and_finite_for_sharp_logits():
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    (near,) = torch.autograd.grad(rince_losses(logits, 0, None, q=1e-4, lam=0.3).sum(), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(6), reduction="sum"), logits)
    torch.testing.assert_close(near, plain, rtol=0.01, atol=1e-4)
    half = torch.randn(4, 9).bfloat16()
    assert rince_losses(half, 3, None, q=0.5, lam=0.01).dtype == torch.float32


def test_symnce_of_a_random_partner_is_zero_whatever_the_model():
    """The reverse InfoNCE takes back what random partners add: the mean over all partners is 0 at beta = 1."""
    for seed in range(3):
        torch.manual_seed(seed)
        row = 5 * torch.randn(1, 7, dtype=torch.float64)
        losses = [symnce_losses(row.roll(-partner, 1), 0, None, beta=1.0) for partner in range(7)]
        torch.testing.assert_close(torch.cat(losses).mean(), torch.tensor(0.0, dtype=torch.float64))
        plain = [symnce_losses(row.roll(-partner, 1), 0, None, beta=0.0) for partner in range(7)]
        assert torch.cat(plain).mean() > math.log(7)


def test_a_row_without_negatives_is_finite():
    mask = torch.ones(3, 3, dtype=torch.bool)
    logits = torch.randn(3, 3, requires_grad=True)
    loss = symnce_losses(logits, 0, mask, beta=0.5).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and gradient.eq(0).all()
