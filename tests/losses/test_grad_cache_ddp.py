"""Two real processes with DDP must end with the gradients that one process has for the union of their batches."""

import torch
import torch.distributed as dist
from testing.cached_steps import (
    PAIRS,
    assert_same_gradients,
    cached_step,
    loss_of_batch,
    model_and_batch,
    plain_step,
    pop_gradients,
)
from testing.launched import on_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.models.tasks import select_representations

CASES = [
    ("tiny_clip", None, False),
    ("tiny_clip", None, True),
    ("tiny_siglip", None, False),
    ("tiny_siglip", None, True),
    ("tiny_siglip", "router", True),
    ("tiny_clip", "grad", True),
]


def gradients_on_rank() -> dict[tuple, dict[str, torch.Tensor]]:
    half = PAIRS // 2
    found = {}
    for case in CASES:
        family, adapter, finds_unused = case
        model, batch = model_and_batch(family, adapter)
        batch = {name: value[dist.get_rank() * half : (dist.get_rank() + 1) * half] for name, value in batch.items()}
        model = DistributedDataParallel(model.train(), find_unused_parameters=finds_unused)
        exchanges = []
        model.register_comm_hook(None, lambda _, bucket: (exchanges.append(1), allreduce_hook(None, bucket))[1])  # noqa: B023
        outputs = select_representations(model, model(**forward_inputs(model, batch)))
        loss_of_batch(model, batch, outputs, *logit_scale_and_bias(model)).backward()
        pop_gradients(model)
        for_a_plain_step = len(exchanges)
        for step in range(2):  # DDP may refuse the second, if the first did not end as it should
            exchanges.clear()
            cached_step(model, batch, 2, no_sync=model.no_sync)
            assert len(exchanges) == for_a_plain_step, (case, step, len(exchanges), for_a_plain_step)
            found[case] = pop_gradients(model)
    return found


def test_two_processes_agree_with_one_on_the_union(tmp_path):
    found = on_ranks([2], tmp_path, gradients_on_rank)[2]
    for family, adapter, finds_unused in CASES:
        model, batch = model_and_batch(family, adapter)
        plain_step(model.train(), batch)
        assert_same_gradients(found[family, adapter, finds_unused], pop_gradients(model), rtol=1e-9)
