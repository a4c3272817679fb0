"""One and two real processes must compute the loss, the gradients and the evidence of the formulas for all pairs."""

import numpy as np
import torch
import torch.distributed as dist
from testing import written_out_gsc
from testing.launched import on_ranks

from hf_dissect.losses import GscLoss, gsc_evidence

PAIRS, GAMMA, TEMPERATURE = 8, 0.3, 0.1
BLOCKS = (2**24, 20)


def in_order(part: torch.Tensor) -> torch.Tensor:
    """What all ranks have, one below the other."""
    everyone = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, part.contiguous())
    return torch.cat(everyone)


def compute_on_rank() -> list[tuple]:
    share = PAIRS // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    found = []
    for dtype in (torch.float64, torch.float32):
        images, texts, labels = (
            torch.tensor(array[rows], dtype=dtype) for array in written_out_gsc.pairs(PAIRS, 4, seed=2)
        )
        for max_logits in BLOCKS:
            leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
            loss, beside = GscLoss(GAMMA, TEMPERATURE, max_logits).with_evidence(*leaves, labels)
            loss.backward()
            alone = gsc_evidence(images, texts, labels, temperature=TEMPERATURE)
            unmasked = gsc_evidence(images, texts, torch.ones_like(labels), temperature=TEMPERATURE)
            own = gsc_evidence(images, texts, labels, temperature=TEMPERATURE, across_ranks=False)
            found.append(
                (
                    dtype,
                    in_order(loss.detach()[None]).mean().item(),
                    # The mean over ranks, as DDP takes it of the parameters' gradients.
                    [in_order(leaf.grad).numpy() / dist.get_world_size() for leaf in leaves],
                    [{name: in_order(values).numpy() for name, values in each.items()} for each in (beside, alone)],
                    {name: in_order(values).numpy() for name, values in unmasked.items()},
                    {name: values.numpy() for name, values in own.items()},  # of the first rank
                )
            )
    return found


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> bool:
    return all(np.allclose(found[name], values, rtol=0, atol=tolerance) for name, values in expected.items())


def test_processes_compute_the_formulas_for_the_union_of_their_pairs(tmp_path):
    images, texts, labels = written_out_gsc.pairs(PAIRS, 4, seed=2)
    loss = written_out_gsc.loss(images, texts, labels, GAMMA, TEMPERATURE)
    gradients = written_out_gsc.gradients(images, texts, labels, GAMMA, TEMPERATURE)
    masked = written_out_gsc.evidence(images, texts, labels, TEMPERATURE)
    unmasked = written_out_gsc.evidence(images, texts, np.ones(PAIRS), TEMPERATURE)
    for world_size, results in on_ranks([1, 2], tmp_path, compute_on_rank).items():
        share = slice(PAIRS // world_size)
        own = written_out_gsc.evidence(images[share], texts[share], labels[share], TEMPERATURE)
        assert len(results) == 4
        for dtype, *found in results:
            tolerance = 1e-10 if dtype == torch.float64 else 1e-6
            assert abs(found[0] - loss) < tolerance * max(1, loss)
            for side, expected in zip(found[1], gradients, strict=True):
                assert np.allclose(side, expected, rtol=1e-6, atol=1e-8 if dtype == torch.float64 else 1e-6)
            assert all(same(each, masked, tolerance) for each in found[2])
            assert same(found[3], unmasked, tolerance) and same(found[4], own, tolerance)
