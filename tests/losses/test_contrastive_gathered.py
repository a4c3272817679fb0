"""Two and four real processes must compute the loss and gradients that one computes on the union of their batches."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_dissect.losses import ContrastiveLoss

PAIRS, DIM = 8, 5


def towers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64)
    tokens = torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64)
    weights = [torch.randn(DIM, DIM, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    return pixels, tokens, *weights


def loss_and_gradients(kind: str, rows: slice, masked: bool, weighted: bool) -> list[torch.Tensor]:
    pixels, tokens, vision, text = towers()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    image_embeds = F.normalize(pixels[rows] @ vision, dim=-1)
    text_embeds = F.normalize(tokens[rows] @ text, dim=-1)
    bias = torch.tensor(-2.0 if kind == "sigmoid" else 0.0, dtype=torch.float64)
    outputs = {
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "logits_per_text": text_embeds @ image_embeds.T * scale.exp() + bias,
    }
    keys = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1])[rows]
    loss = ContrastiveLoss(kind, mask_false_negatives=masked)(
        outputs,
        scale=scale.exp(),
        bias=bias,
        weights=torch.linspace(0.5, 2, PAIRS)[rows] if weighted else None,
        image_key=keys,
        caption_key=keys + 100,
    )
    loss.backward()
    return [loss.detach(), vision.grad, text.grad, scale.grad]


def compute_on_rank(rank: int, world_size: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    share = PAIRS // world_size
    found = {}
    for kind in ("softmax", "sigmoid"):
        for masked, weighted in ((False, False), (True, True)):
            parts = loss_and_gradients(kind, slice(rank * share, (rank + 1) * share), masked, weighted)
            for part in parts:
                dist.all_reduce(part)
            found[kind, masked] = [part / world_size for part in parts]
    if rank == 0:
        results.put({key: [part.numpy() for part in parts] for key, parts in found.items()})
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_agree_with_one_process_on_the_union(world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        compute_on_rank, (world_size, port, results), nprocs=world_size, join=False, start_method="spawn"
    )
    found = results.get()
    while not processes.join():
        pass
    for kind in ("softmax", "sigmoid"):
        for masked in (False, True):
            expected = loss_and_gradients(kind, slice(None), masked, weighted=masked)
            for one, many in zip(expected, found[kind, masked], strict=True):
                assert torch.allclose(one, torch.from_numpy(many), rtol=1e-10, atol=1e-12), (kind, masked)
