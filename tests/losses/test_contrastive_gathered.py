"""Two, three and four real processes must compute the loss and gradients that one computes on all of their pairs."""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from testing.launched import on_ranks
from testing.made_tensors import MadeTensors

from hf_dissect.losses import ContrastiveLoss

PAIRS, DIM = 12, 5
BLOCKS = {"one block": 2**24, "uneven blocks": 29, "row by row": 1}
CASES = list(itertools.product(("softmax", "sigmoid"), (False, True), BLOCKS))
TOLERANCES = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=1e-5, atol=1e-6)}


def loss_and_gradients(kind, masked, block, rows, dtype, alone=False) -> list[torch.Tensor]:
    """The loss of some of the pairs, and the gradients of their embeddings, the scale and the bias."""
    generator = torch.Generator().manual_seed(3)
    embeds = F.normalize(torch.randn(2, PAIRS, DIM, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    image_embeds, text_embeds = (side[rows].clone().requires_grad_() for side in embeds)
    scale = torch.tensor(4.5, dtype=dtype, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    outputs = {"image_embeds": image_embeds, "text_embeds": text_embeds}
    if alone:
        outputs["logits_per_text"] = text_embeds @ image_embeds.T * scale + bias
    keys = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8, 9, 5, 11])[rows]
    loss = ContrastiveLoss(kind, masked, BLOCKS[block])(
        outputs,
        scale=scale,
        bias=bias,
        weights=torch.linspace(0.5, 2, PAIRS)[rows] if masked else None,
        image_key=keys,
        caption_key=torch.arange(100, 100 + PAIRS)[rows] // 6 * keys,
    )
    loss.backward()
    return [loss.detach(), image_embeds.grad, text_embeds.grad, scale.grad, bias.grad]


def means_over_ranks(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """As DDP takes them; the embeddings' gradients are of different rows and are put one below the other."""
    world_size, means = dist.get_world_size(), []
    for part in parts:
        everyone = [torch.empty_like(part) for _ in range(world_size)]
        dist.all_gather(everyone, part)
        means.append((torch.cat(everyone) if part.dim() else torch.stack(everyone).sum()) / world_size)
    return means


def largest_tensor_of_the_ring() -> int:
    """Of 4 pairs a rank whose embeddings of 64 dimensions are all that is large."""
    embeds = F.normalize(torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    outputs = {"image_embeds": embeds[0].clone().requires_grad_(), "text_embeds": embeds[1].clone().requires_grad_()}
    with MadeTensors() as made:
        ContrastiveLoss("sigmoid")(outputs, scale=torch.tensor(9.0), bias=torch.tensor(-9.0)).backward()
    return made.largest


def compute_on_rank() -> tuple[dict[tuple, list[torch.Tensor]], int]:
    share = PAIRS // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    cases = itertools.product(CASES, TOLERANCES)
    found = {(case, dtype): means_over_ranks(loss_and_gradients(*case, rows, dtype)) for case, dtype in cases}
    return found, largest_tensor_of_the_ring()


def test_processes_agree_with_one_process_on_the_union(tmp_path):
    for world_size, (found, largest) in on_ranks([2, 3, 4], tmp_path, compute_on_rank).items():
        assert len(found) == len(CASES) * len(TOLERANCES)
        for (case, dtype), parts in found.items():
            expected = loss_and_gradients(*case, slice(None), dtype, alone=True)
            for one, many in zip(expected, parts, strict=True):
                assert torch.allclose(one, many, **TOLERANCES[dtype]), (world_size, case, dtype)
        assert largest == 4 * 64  # one rank's embeddings, never those of all
